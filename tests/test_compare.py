"""`compare`: three models asked the same, in the terminal and on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium
from evaluation_models import make_gpt2, make_llama, make_tokenizer, nudged, save
from typer.testing import CliRunner

from deltafold.cli import app
from deltafold.comparing import trio as trio_module
from deltafold.comparing.page import escaped
from deltafold.comparing.trio import Trio, share_equal
from deltafold.errors import DeltafoldError, MismatchError, UsageError

PROMPT = "1+1="


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of which only the matrices moved, and its lossless archive."""
    from deltafold.compressing.compress import compress

    folder = tmp_path_factory.mktemp("compared")
    save(make_llama(0), folder / "base", make_tokenizer())
    tuned = make_llama(0)
    nudged(tuned.model.layers, 1, 0.2)
    save(tuned, folder / "tuned", make_tokenizer())
    compress(folder / "base", folder / "tuned", folder / "tuned.delta", "lossless")
    return folder


def opened(models: Path, **options: Any) -> Trio:
    return Trio(models / "base", models / "tuned", models / "tuned.delta", **options)


def generated(folder: Path, tokens: int) -> str:
    """What transformers itself writes, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = torch.tensor([tokenizer(PROMPT).input_ids])
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(given, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)


@pytest.mark.integration
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_answers_are_those_of_the_models(
    models: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Kept in memory, and loaded in turn: the same answers, twice."""
    monkeypatch.setattr(trio_module, "SHARE_OF_MEMORY", share)
    with opened(models) as trio:
        assert trio.keeps == (share > 0)
        first = list(trio.ask(PROMPT, 12))
        again = list(trio.ask(PROMPT, 12))
    assert [answer.name for answer in first] == ["base", "fine-tune", "restored"]
    texts = [answer.text for answer in first]
    assert texts == [answer.text for answer in again]
    assert texts[0] == generated(models / "base", 12)
    assert texts[1] == texts[2] == generated(models / "tuned", 12)
    assert texts[0] != texts[1]
    held = sum(f.stat().st_size for f in (models / "tuned.delta").rglob("*") if f.is_file())
    assert first[2].n_bytes == held


@pytest.mark.integration
def test_what_did_not_change_is_held_once(models: Path) -> None:
    with opened(models) as trio:
        list(trio.ask(PROMPT, 1))
        base, tuned, restored = (trio._kept[name].model for name in trio_module.NAMES)
        embeddings = [m.get_input_embeddings().weight.data_ptr() for m in (base, tuned, restored)]
        assert len(set(embeddings)) == 1
        down = [m.model.layers[0].mlp.down_proj.weight.data_ptr() for m in (base, tuned, restored)]
        assert len(set(down)) == 2  # a lossless archive restores the fine-tune's own


def test_equal_parameters_are_shared_and_others_are_not() -> None:
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    two.bias.data.copy_(one.bias.data)
    assert share_equal(one, two) == 8
    assert one.bias.data_ptr() == two.bias.data_ptr()
    assert one.weight.data_ptr() != two.weight.data_ptr()


def test_what_cannot_be_asked(models: Path, tmp_path: Path) -> None:
    with opened(models) as trio:
        for prompt, options, sentence in (
            (" ", {}, "empty"), (PROMPT, {"max_new_tokens": 0}, "at least 1"),
            (PROMPT, {"chat": True}, "no chat template"), ("1" * 130, {}, "shorten"),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=sentence):
                list(trio.ask(prompt, **options))
    with pytest.raises(UsageError, match="no archive"):
        Trio(models / "base", models / "tuned", models / "tuned")
    save(make_llama(0, scale=0.1), tmp_path / "other", make_tokenizer())
    with (
        pytest.raises(DeltafoldError),
        Trio(tmp_path / "other", models / "tuned", models / "tuned.delta") as trio,
    ):  # of the same shapes: its tensors' hashes tell
        list(trio.ask(PROMPT, 1))
    save(make_gpt2(0), tmp_path / "gpt2", make_tokenizer())
    with pytest.raises(MismatchError):  # other names: no model is loaded to see it
        Trio(tmp_path / "gpt2", models / "tuned", models / "tuned.delta")


@pytest.mark.integration
def test_the_terminal(models: Path) -> None:
    sources = [str(models / name) for name in ("base", "tuned", "tuned.delta")]
    command = ["compare", *sources, "--prompt", PROMPT, "--max-new-tokens", "5"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("base", "fine-tune", "restored", "smaller"))
    printed = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    rows = json.loads(printed.output)
    assert [row["name"] for row in rows] == ["base", "fine-tune", "restored"]
    assert rows[1]["text"] == rows[2]["text"] == generated(models / "tuned", 5)


def test_markup_in_a_name_is_shown_as_it_is() -> None:
    assert escaped("<b>_x_</b>") == "\\<b\\>\\_x\\_\\</b\\>"


@pytest.mark.integration
def test_the_page_answers(models: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from deltafold.comparing.page import serve

    with opened(models) as trio, chromium(offline=False) as driver:
        expected = [answer.text for answer in trio.ask(PROMPT, 64)]
        page, url = serve(trio, "tuned.delta", None, wait=False)
        try:
            driver.get(url)
            driver.implicitly_wait(60)
            driver.find_element("css selector", "label textarea").send_keys(PROMPT)
            driver.find_element("xpath", "//button[contains(., 'Ask all three')]").click()
            boxes = driver.find_elements("css selector", ".answers textarea")
            until(driver, lambda: [box.get_property("value") for box in boxes] == expected)
        finally:
            page.close()


def until(driver: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda _: condition())
