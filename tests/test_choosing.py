"""`compress` with something left to measurement: settings by KL, and the smallest archive below one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_hashes
from evaluation_models import make_llama, make_tokenizer, nudged, save, write_rows
from refusals import refused

from deltafold import compress
from deltafold.calibration.samples import SampleError
from deltafold.compressing.choosing import RATIO_CLOSE, _bracket
from deltafold.errors import BudgetError, UsageError

Folders = tuple[Path, Path, Path]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Base and fine-tune of a tiny model, and text in a file."""
    folder = tmp_path_factory.mktemp("tiny")
    base = save(make_llama(3), folder / "base", make_tokenizer())
    tuned = save(nudged(make_llama(3), 4, 0.4), folder / "tuned", make_tokenizer())
    rows = [{"prompt": f"{n} + {n + 2} =", "answer": f" {2 * n + 2}"} for n in range(24)]
    return base, tuned, write_rows(folder / "text.jsonl", rows)


def run(folders: Folders, out: Path, method: str = "auto", **options: Any) -> Any:
    base, tuned, text = folders
    return compress(base, tuned, out, method, **({"calibration": text, "samples": 24} | options))


def test_the_smallest_archive_below_a_divergence(folders: Folders, tmp_path: Path) -> None:
    record = run(folders, tmp_path / "x.delta", kl_at_most=0.3)
    tried = record["tried"]
    assert {each["criterion"] for each in tried} == {"KL to the fine-tune"}
    (kept,) = [each for each in tried if each.get("kept")]
    ratio = kept["settings"]["file_ratio"]
    assert kept["value"] <= 0.3
    assert ratio == max(each["settings"]["file_ratio"] for each in tried if each["value"] <= 0.3)
    above = [each["settings"]["file_ratio"] for each in tried if each["value"] > 0.3]
    assert not above or min(above) <= RATIO_CLOSE * ratio
    assert record["totals"]["file_ratio"] == pytest.approx(ratio, rel=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.delta", "x.delta.record.json"]
    # The same bytes as that ratio asked for; and a tighter limit gives a larger archive.
    run(folders, tmp_path / "same.delta", file_ratio=ratio)
    assert tree_hashes(tmp_path / "same.delta") == tree_hashes(tmp_path / "x.delta")
    tighter = run(folders, tmp_path / "tight.delta", kl_at_most=0.05)
    assert tighter["totals"]["archive_bytes"] > record["totals"]["archive_bytes"]


def test_a_divergence_that_cannot_be_met(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    refused(
        BudgetError,
        lambda: run(folders, out, "lowrank", kl_at_most=1e-9),
        "KL 1e-09 cannot be met",
        "file ratio 2",
        "lossless",
    )
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_there(folders: Folders, tmp_path: Path) -> None:
    for option in ({"kl_at_most": 0.1}, {"method": "impart", "beta": "auto"}):
        options = option | {"calibration": "nowhere.txt"}
        refused(SampleError, lambda o=options: run(folders, tmp_path / "x", **o), "nowhere.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kl_at_most": 0.0}, ("--kl-at-most", "above 0")),
        ({"kl_at_most": -1.0}, ("--kl-at-most", "-1")),
        ({"kl_at_most": float("nan")}, ("--kl-at-most", "nan")),
        ({"kl_at_most": float("inf")}, ("--kl-at-most", "inf")),
        ({"kl_at_most": 0.1, "file_ratio": 8}, ("--kl-at-most", "budget", "one of them")),
        ({"kl_at_most": 0.1, "n_bytes": 9000}, ("--kl-at-most", "budget")),
        ({"kl_at_most": 0.1, "method": "impart", "beta": "auto"}, ("--kl-at-most", "beta")),
        ({"kl_at_most": 0.1, "method": "lossless"}, ("lossless", "exact")),
        ({"step": "auto"}, ("step of auto cannot be auto",)),
    ],
)
def test_requests_that_make_no_sense(
    folders: Folders, tmp_path: Path, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    refused(UsageError, lambda: run(folders, tmp_path / "x.delta", **options), *names)
    assert list(tmp_path.iterdir()) == []


def test_settings_by_divergence(folders: Folders, tmp_path: Path) -> None:
    options = {"fallback": False, "nominal_ratio": 3, "beta": "auto", "c": "auto"}
    record = run(folders, tmp_path / "x.delta", "impart", **options)
    tried = record["tried"]
    assert [(t["settings"]["beta"], t["settings"]["c"]) for t in tried] == [
        (beta, c) for beta in (0.6, 0.7, 0.8) for c in (0.5, 1.0)
    ]
    assert {each["criterion"] for each in tried} == {"KL to the fine-tune"}
    best = min(tried, key=lambda each: each["value"])
    assert len({each["value"] for each in tried}) > 1
    assert [each for each in tried if each.get("kept")] == [best]
    assert {name: record["settings"][name] for name in ("beta", "c")} == best["settings"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.delta", "x.delta.record.json"]


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (100.0, (64.0, 128.0)),
        (32.0, (32.0, 64.0)),
        (5.0, (4.0, 8.0)),
        (1.0, (None, 2.0)),
        (1e9, (4096.0, None)),
    ],
)
def test_the_search_brackets_the_ratio(
    highest: float, expected: tuple[float | None, float | None]
) -> None:
    assert _bracket(lambda ratio: ratio <= highest) == expected
