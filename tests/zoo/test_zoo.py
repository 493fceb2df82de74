"""Every architecture of the zoo: each verb does the right thing, or refuses where the record says so.

A selection is checked in every run, all of it with `-m slow` (or `make zoo`, which writes the record anew).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_zoo import RECORD, names, outcome, specimen

pytestmark = pytest.mark.integration

EVERY = ("exact", "auto", "load", "fold", "factor", "share", "merge", "export")
OFTEN: dict[str, tuple[str, ...]] = {
    "ApertusForCausalLM": ("exact", "fold"),
    "BertForSequenceClassification": ("fold", "factor", "merge", "export"),
    "CLIPModel": ("exact", "factor", "export"),
    "ConvNextForImageClassification": ("exact", "fold"),
    "DeepseekV3ForCausalLM": ("export", "fold"),
    "Dinov2ForImageClassification": ("fold",),
    "EsmForMaskedLM": ("fold",),
    "FalconForCausalLM": ("factor",),
    "FalconH1ForCausalLM": ("factor", "export"),
    "FluxPipeline": ("exact", "auto", "merge", "load"),
    "FluxTransformer2DModel": ("exact", "merge"),
    "GPTNeoXForCausalLM": ("factor", "share"),
    "Glm4MoeForCausalLM": ("export",),
    "JambaForCausalLM": ("exact", "fold"),
    "LlamaForCausalLM": EVERY,
    "MambaForCausalLM": ("load", "factor", "export"),
    "MixtralForCausalLM": ("exact", "merge", "share"),
    "ModernBertDecoderForCausalLM": ("factor",),
    "OPTForCausalLM": ("export",),
    "ProphetNetForConditionalGeneration": ("merge",),
    "Qwen2VLForConditionalGeneration": ("exact", "load", "fold"),
    "ResNetForImageClassification": ("exact", "export"),
    "RwkvForCausalLM": ("factor",),
    "SwinForImageClassification": ("auto",),
    "T5ForConditionalGeneration": ("exact", "fold", "factor"),
    "Wav2Vec2ForCTC": ("exact", "merge"),
    "WhisperForConditionalGeneration": ("load", "export"),
}
"""What has been wrong once, and one of each kind."""


def cells() -> list[Any]:
    """All of the zoo; what is not checked often only where slow tests are run."""
    return [
        pytest.param(
            name, verb, id=f"{name}-{verb}",
            marks=() if verb in OFTEN.get(name, ()) else pytest.mark.slow,
        )
        for name in names()
        for verb in EVERY
    ]  # fmt: skip


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, str]]:
    """What came of each verb, by architecture."""
    return {row["architecture"]: row["verbs"] for row in json.loads(RECORD.read_text())["rows"]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The models of the architecture that is being checked: they are written once."""
    yield {"root": tmp_path_factory.mktemp("zoo")}


@pytest.mark.parametrize(("name", "verb"), cells())
def test_right_or_refused(
    name: str, verb: str, record: dict[str, dict[str, str]], kept: dict[str, Any]
) -> None:
    if kept.get("name") != name:
        folder: Path = kept["root"] / name
        folder.mkdir(exist_ok=True)
        kept |= {"name": name, "made": specimen(name, folder)}
    it, verbs = kept["made"]
    found, wanted = outcome(it, verb, verbs[verb]), record[name][verb]
    assert found == wanted or "right" not in (found, wanted), found


def test_the_record_is_of_the_whole_zoo(record: dict[str, dict[str, str]]) -> None:
    assert list(record) == names() and len(record) >= 60
    assert {verb for verbs in record.values() for verb in verbs} == set(EVERY)
    assert all(set(verbs) == set(EVERY) for verbs in record.values())
    assert set(OFTEN) <= set(record)
