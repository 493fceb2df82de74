"""The demo: what it compresses, one true run on a few rows, and that its result fits one screen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deltafold.codecs import get, names
from deltafold.running.record import read_record, write_record

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 80, 30  # characters, lines


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`demo/run.py`, found as a script finds its neighbours, in a screen of 80 characters."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    import run

    yield run


def made_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A record of the demo with the widest figures it can have."""
    wide = {"exact_match": 0.987, "exact_match_stderr": 0.0123, "kl": 1.2e-5, "kl_stderr": 4e-6}
    return {
        "record_version": 1,
        "kind": "benchmark",
        "title": "demo family",
        "data": "task sort, 200 held-out rows",
        "rows": [{"finetune": "sort", **row, **wide} for row in rows],
        "reference": {
            "sort": {
                "base": wide,
                "fine-tune": {"exact_match": 1.0, "exact_match_stderr": 0.0},
            }
        },
        "seconds": 30.0,
    }


def test_the_usual_way_is_part_of_everything(demo: ModuleType) -> None:
    usual, everything = demo.jobs(everything=False), demo.jobs(everything=True)
    assert {method for method, _ in usual} == {"auto", "lossless"}
    assert set(usual) < set(everything)
    assert len(set(everything)) == len(everything)
    for name in (name for name in names() if get(name).method):
        sizes = {ratio for method, ratio in everything if method == name}
        assert sizes >= set(demo.ALL_RATIOS) if get(name).lossy else sizes == {None}


def test_the_result_fits_one_screen(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "method": method,
            "asked_file_ratio": ratio,
            "file_ratio": ratio or 1.9,
            "archive": f"{method}-{ratio}.delta",
            "archive_bytes": 6.45e6 / (ratio or 1.9),
        }
        for method, ratio in demo.jobs(everything=False)
    ]
    write_record(made_record(rows), tmp_path / "record.json")
    import screen

    screen.show(tmp_path / "record.json", "sort", everything=False)
    printed = capsys.readouterr().out.splitlines()
    # two lines are left for what goes on, two for the command and the shell's prompt
    assert len(printed) <= HEIGHT - 4
    paths = [line for line in printed if str(tmp_path) in line]  # as long as the folder's name
    assert all(len(line.rstrip()) < WIDTH for line in printed if line not in paths)
    assert sum(line.split()[:1] == ["auto"] for line in printed) == len(demo.MAIN_RATIOS)


@pytest.mark.integration
def test_a_run_measures_all_models_on_the_same_rows(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "MAIN_METHOD", "impart")  # a tenth of the work
    monkeypatch.setattr(demo, "MAIN_RATIOS", (16, 32))
    stale, own = tmp_path / "dare-8.delta" / "manifest.json", tmp_path / "mine.txt"
    stale.parent.mkdir()
    stale.write_text("{}", encoding="utf-8")
    own.write_text("mine", encoding="utf-8")
    demo.main(["--out", str(tmp_path), "--rows", "3", "--finetune", "add"])

    record = read_record(tmp_path / "record.json")
    assert record["data"] == "task add, 3 held-out rows"
    assert record["settings"]["tasks"][0]["rows"] == 3
    assert [row["method"] for row in record["rows"]] == ["lossless", "impart", "impart"]
    for row in record["rows"]:
        files = (tmp_path / row["archive"]).rglob("*")
        assert row["archive_bytes"] == sum(file.stat().st_size for file in files if file.is_file())
    lossless, known = record["rows"][0], record["reference"]["add"]
    assert lossless["exact_match"] == known["fine-tune"]["exact_match"]
    assert abs(lossless["kl"]) < 1e-9 < known["base"]["kl"]
    assert own.is_file()
    assert not stale.exists()

    printed = capsys.readouterr().out
    assert "Task add, 3 held-out rows, the same for every line." in printed
    picture = next(line for line in printed.splitlines() if line.startswith("picture: "))
    assert Path(picture.removeprefix("picture: ")).read_bytes().startswith(b"\x89PNG")
    inspect = next(line for line in printed.splitlines() if "deltafold inspect" in line)
    assert Path(shlex.split(inspect)[-1]) == tmp_path / "impart-32.delta"
    assert (tmp_path / "impart-32.delta").is_dir()


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--finetune", "base"]])
def test_a_wrong_argument_is_refused_before_anything_is_written(
    demo: ModuleType, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        demo.main([*arguments, "--out", str(tmp_path / "out")])
    assert refusal.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
