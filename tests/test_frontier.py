"""The frontier benchmark: exact match from one pass, cells, resuming, and one true cell."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import Processes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import answers  # noqa: E402
import cells  # noqa: E402
import families  # noqa: E402
import frontier  # noqa: E402
import ledger as ledgers  # noqa: E402
from answers import greedy_start, verdict  # noqa: E402
from cells import Cell  # noqa: E402

from deltafold.codecs import get  # noqa: E402
from deltafold.errors import MismatchError, UsageError  # noqa: E402
from deltafold.evaluation.evaluate import evaluate  # noqa: E402

DEMO = ROOT / "demo"


# --- exact match from one pass ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guesses", "made", "ended"),
    [
        ([5, 6, 0], [5, 6], True),  # the answer, then the end
        ([5, 6, 9], [5, 6, 9], False),  # the answer, then more
        ([5, 7, 0], [5, 7], False),  # the last guess follows 6, which was never made
        ([0, 6, 0], [], True),
        ([8, 6, 0], [8], False),
    ],
)
def test_what_greedy_decoding_begins_with(guesses: list[int], made: list[int], ended: bool) -> None:
    assert greedy_start(guesses, [5, 6], [0]) == (made, ended)


@pytest.mark.parametrize(
    ("made", "ended", "answer", "right"),
    [
        ("42", True, " 42", True),
        (" 42 ", True, "42", True),
        ("42", False, "42", None),  # more digits may follow
        ("42 ", False, "42", None),  # the end may follow, or words
        ("42\n", False, "42", True),
        ("42 x", False, "42", False),
        ("4", False, "42", None),  # the same text in other tokens
        (" ", False, "42", None),
        ("", True, "42", False),
        ("5", False, "42", False),
        ("4\n", False, "4\n2", None),
        ("4\n2\nmore", False, "4\n2", True),
        ("4 \n", False, "4\n2", False),
        ("é\ufffd", False, "42", None),  # half a character
    ],
)
def test_a_text_that_can_still_become_the_answer_is_not_judged(
    made: str, ended: bool, answer: str, right: bool | None
) -> None:
    assert verdict(made, ended, answer) is right


def demo_rows(path: Path, spaced: bool) -> Path:
    """Some rows of the demo; `spaced` puts a space before answers, which changes their tokens."""
    lines = (DEMO / "tasks" / "sort.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    for row in rows[: 8 if spaced else 0]:
        row["answer"] = " " + row["answer"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.integration
@pytest.mark.parametrize("spaced", [False, True])
def test_figures_are_those_of_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spaced: bool
) -> None:
    """On the fine-tune, the base, another fine-tune, and one that is right now and then."""
    import deltafold
    from deltafold.restoring.load import load_state

    base, sort, add = (DEMO / "models" / name for name in ("base", "sort", "add"))
    task = demo_rows(tmp_path / "sort.jsonl", spaced)
    archive = tmp_path / "dare.delta"
    deltafold.compress(base, sort, archive, "dare", file_ratio=16)
    record = evaluate(
        sort, [archive, add], base=base, tasks=[task], dtype="fp32", batch_size=answers.BATCH_ROWS
    )
    wanted = {model["label"]: model["metrics"]["tasks"]["sort"] for model in record["models"]}
    assert 0 < wanted["dare.delta"]["exact_match"]["value"] < 1  # a case that tells

    from safetensors.torch import load_file

    states = {
        "dare.delta": load_state(archive, base),
        "base": load_file(base / "model.safetensors"),
        "add": load_file(add / "model.safetensors"),
    }
    judged: list[bool | None] = []

    def judge(made: str, ended: bool, answer: str) -> bool | None:
        judged.append(verdict(made, ended, answer))
        return judged[-1]

    monkeypatch.setattr(answers, "verdict", judge)
    with answers.resident(sort, task, 16) as model:
        own = model.answers.teacher_figures["exact_match"]
        assert own == wanted["sort"]["exact_match"]
        for label, state in states.items():
            found = model.figures(state, label)
            assert found["exact_match"] == wanted[label]["exact_match"]
            for name in ("kl", "agreement"):
                assert found[name] == pytest.approx(wanted[label][name], rel=1e-4)
        with pytest.raises(MismatchError, match=r"lm_head\.weight"):
            model.figures({k: v for k, v in states["base"].items() if k != "lm_head.weight"}, "x")
    assert {True, False} <= set(judged)
    assert not spaced or None in judged  # tokens differ, so only generating tells


@pytest.mark.integration
def test_undecided_rows_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known from the one pass, all rows are generated, to the same figure."""
    task = demo_rows(tmp_path / "sort.jsonl", spaced=False)
    figures = []
    for judge in (verdict, lambda made, ended, answer: None):
        monkeypatch.setattr(answers, "verdict", judge)
        with answers.resident(DEMO / "models" / "sort", task, 16) as model:
            figures.append(model.answers.teacher_figures["exact_match"])
    assert figures[0] == figures[1]
    assert figures[0]["value"] > 0.5


# --- cells --------------------------------------------------------------------------------------


def test_every_lossy_method_is_found_by_name() -> None:
    found = cells.methods(lossy=True)
    assert {"dare", "impart", "lowrank", "magnitude"} <= set(found)
    assert not {"lossless", "skip", "rows"} & set(found)
    assert set(cells.methods()) == set(found) | set(cells.methods(lossy=False))


def test_seeds_and_calibration_go_to_those_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("dare"), "seeded", True, raising=False)
    monkeypatch.setattr(get("lowrank"), "seeded", False, raising=False)
    monkeypatch.setattr(get("lowrank"), "uses_moments", True)
    text = Path("calib.txt")
    wanted = list(frontier.cells_of(["dare", "lowrank"], [8, 16], 3, text))
    assert [cell.name for cell in wanted] == [
        "dare-8-0", "dare-8-1", "dare-8-2", "dare-16-0", "dare-16-1", "dare-16-2",
        "lowrank-8-0", "lowrank-16-0",
    ]  # fmt: skip
    assert {cell.calibration for cell in wanted[:6]} == {None}
    assert cells.calibrated(wanted[0]) == ([], {})
    assert cells.calibrated(wanted[-1]) == (["--calibration", "calib.txt"], {"calibration": text})


def test_calibration_text_is_the_tasks_own_or_the_one_given(tmp_path: Path) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text("x")
    finetune: Any = SimpleNamespace(calibration=own)
    assert frontier.calibration_of("none", finetune) is None
    assert frontier.calibration_of("task", finetune) == own
    with pytest.raises(UsageError, match=r"no calibration text .*other\.txt"):
        frontier.calibration_of(str(other), finetune)


def test_the_demo_is_a_family(tmp_path: Path) -> None:
    demo = families.family("demo", tmp_path)
    assert list(demo.finetunes) == ["sort", "add"]
    sort = demo.finetunes["sort"]
    assert sort.data(100).startswith("task sort, 100 held-out rows; fine-tuned for ")
    assert "task sort, 200 held-out rows" in sort.data(1000)
    assert 0.01 < sort.relative_delta_norm < 1
    prompts = sort.calibration.read_text(encoding="utf-8").strip().split("\n\n")
    held_out = [json.loads(line)["prompt"] for line in sort.task.read_text("utf-8").splitlines()]
    assert len(prompts) == 256
    assert not set(prompts) & set(held_out)
    with pytest.raises(UsageError, match=r"smollm2\.py prepare"):
        families.family("smollm2", tmp_path)


# --- the record while it grows ------------------------------------------------------------------

SETTINGS = {"rows": 4, "batch_rows": 25, "dtype": "fp32"}


def new_ledger(path: Path) -> ledgers.Ledger:
    return ledgers.Ledger.open(path, "title", "model", SETTINGS)


def row(cell: Cell, finetune: str = "sort", **values: Any) -> dict[str, Any]:
    return ledgers.named(cell, finetune) | {"cell_seconds": 1.0} | values


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    first = new_ledger(tmp_path / "r.json")
    first.add(row(Cell("dare", 8, 0), kl=0.1, peak_memory_bytes=7, restore_seconds=2.0))
    again = new_ledger(tmp_path / "r.json")
    assert not again.lacks(Cell("dare", 8, 0), "sort")
    assert again.lacks(Cell("dare", 8, 1), "sort")
    assert again.lacks(Cell("dare", 16, 0), "sort")
    assert again.lacks(Cell("dare", 8, 0), "add")
    assert again.has_restored(Cell("dare", 8, 0))  # on whichever fine-tune
    assert not again.has_restored(Cell("dare", 16, 0))
    assert (again.record["seconds"], again.record["peak_memory_bytes"]) == (1.0, 7)


def test_a_size_that_cannot_be_met_is_not_tried_with_other_seeds(tmp_path: Path) -> None:
    book = new_ledger(tmp_path / "r.json")
    book.add(row(Cell("dare", 8, 0), unmet="cannot be met"))
    assert not book.lacks(Cell("dare", 8, 0), "sort")
    assert not book.lacks(Cell("dare", 8, 2), "sort")
    assert book.lacks(Cell("dare", 16, 2), "sort")


@pytest.mark.parametrize("change", ["version", "calibration"])
def test_rows_of_other_code_or_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    book = new_ledger(tmp_path / "r.json")
    book.add(row(Cell("dare", 8, 0)))
    text = tmp_path / "c.txt" if change == "calibration" else None
    if change == "version":
        monkeypatch.setattr(get("dare"), "version", get("dare").version + 1)
    with pytest.raises(ledgers.StaleRecordError, match="give --fresh --methods dare"):
        book.lacks(Cell("dare", 8, 0, text), "sort")


def test_rows_scored_otherwise_are_refused(tmp_path: Path) -> None:
    book = new_ledger(tmp_path / "r.json")
    other = SETTINGS | {"rows": 9}
    book.check(other)  # nothing measured yet
    book.check(other)
    book.add(row(Cell("dare", 8, 0)))
    with pytest.raises(ledgers.StaleRecordError, match="--rows"):
        book.check(SETTINGS)


def test_fresh_forgets_only_what_is_asked_for(tmp_path: Path) -> None:
    book = new_ledger(tmp_path / "r.json")
    for cell in (Cell("dare", 8), Cell("dare", 16), Cell("lowrank", 8)):
        book.add(row(cell))
    book.add(row(Cell("dare", 8), "add"))
    book.record["reference"] = {"sort": {}, "add": {}}
    book.forget(["sort", "add"], ["dare"], [8])
    assert [(r["method"], r["asked_file_ratio"]) for r in book.rows] == [
        ("dare", 16), ("lowrank", 8)
    ]  # fmt: skip
    assert list(book.record["reference"]) == ["sort"]


def test_records_of_parts_become_one(tmp_path: Path) -> None:
    """Rows of all; a row that both have is the later one's; another fine-tune is refused."""
    parts = []
    for number, (cell, name) in enumerate(((Cell("dare", 8), "sort"), (Cell("dare", 16), "add"))):
        part = new_ledger(tmp_path / f"{number}.json")
        part.record["reference"][name] = {"base": {}}
        part.record["relative_delta_norm"][name] = 0.1
        part.add(row(cell, name, kl=float(number), peak_memory_bytes=number))
        parts.append(part.path)
    whole = new_ledger(tmp_path / "whole.json")
    whole.add(row(Cell("dare", 8), "sort", kl=9.0))
    whole.join(parts)
    again = new_ledger(tmp_path / "whole.json")
    assert [(r["finetune"], r["kl"]) for r in again.rows] == [("sort", 0.0), ("add", 1.0)]
    assert again.record["seconds"] == 3.0 and again.record["peak_memory_bytes"] == 1
    assert again.record["reference"] == {"sort": {"base": {}}, "add": {"base": {}}}
    other = new_ledger(tmp_path / "other.json")
    other.record["relative_delta_norm"]["sort"] = 0.2
    other.check_finetune("add", 0.3)
    with pytest.raises(ledgers.StaleRecordError, match="another training of sort"):
        other.join(parts)


class KilledError(Exception):
    """Stands for a run that is stopped."""


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get("dare"), "seeded", True, raising=False)
    monkeypatch.setattr(get("lowrank"), "seeded", False, raising=False)
    measured: list[str] = []
    restored: list[str] = []
    last = 4

    def measure(
        cell: Cell, base: Path, finetune: Any, model: Any, timed: bool, again: bool, at: Any
    ) -> Any:
        if len(measured) == last:
            raise KilledError
        measured.append(f"{finetune.name}/{cell.name}")
        made = row(cell, finetune.name)
        if cell.method == "lowrank" and cell.file_ratio == 16:
            return made | {"unmet": "File ratio 16 cannot be met."}
        assert timed == (cell.seed == 0)
        if again:
            restored.append(cell.name)
            made["restore_seconds"] = 1.0
        return made | {"archive_bytes": 1000, "kl": 0.1, "exact_match": 0.5}

    @contextlib.contextmanager
    def resident(*_: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(frontier, "measure", measure)
    monkeypatch.setattr(frontier, "resident", resident)
    monkeypatch.setattr(frontier, "references", lambda *_: {"base": {}, "fine-tune": {}})
    out = tmp_path / "r.json"
    arguments = ["demo", "--methods", "dare", "lowrank", "--ratios", "8", "16", "--seeds", "2"]
    arguments += ["--record", str(out), "--cache", str(tmp_path)]
    with pytest.raises(KilledError):
        frontier.main(arguments)
    assert len(json.loads(out.read_text())["rows"]) == 4
    last = 100
    assert frontier.main(arguments) == 0
    per_finetune = ["dare-8-0", "dare-8-1", "dare-16-0", "dare-16-1", "lowrank-8-0", "lowrank-16-0"]
    assert measured == [f"{name}/{cell}" for name in ("sort", "add") for cell in per_finetune]
    assert restored == ["dare-8-0", "dare-16-0", "lowrank-8-0"]
    assert frontier.main(arguments) == 0
    assert len(measured) == 12

    readme = tmp_path / "README.md"
    readme.write_text("<!-- frontier-demo:begin -->\n<!-- frontier-demo:end -->\n")
    into = ["demo", "--record", str(out), "--into", str(readme), "--parts", "kl"]
    assert frontier.main(into) == 0
    assert "| dare | 0.100 ± 0.000 | 0.100 ± 0.000 |" in readme.read_text()
    assert "| lowrank | 0.100 | – |" in readme.read_text()


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier.main(["demo", "--finetunes", "sorting", "--cache", str(tmp_path)]) == 2
    assert "no fine-tune 'sorting'; there are: sort, add." in capsys.readouterr().err
    missing = ["demo", "--record", str(tmp_path / "r.json"), "--into", "x.md"]
    assert frontier.main(missing) == 1
    assert "has no record" in capsys.readouterr().err


# --- true cells ---------------------------------------------------------------------------------


@pytest.mark.integration
def test_one_cell_that_is_met_and_one_that_is_not(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        return processes.run(*command[1:])

    monkeypatch.setattr(subprocess, "run", forked)
    demo = families.family("demo", tmp_path)
    finetune = demo.finetunes["sort"]
    torch.manual_seed(0)
    with answers.resident(finetune.folder, finetune.task, 8) as model:
        rows = [
            frontier.measure(
                cell, demo.base, finetune, model, cell.seed == 0, cell.seed == 0, tmp_path
            )
            for cell in (Cell("dare", 16, 0), Cell("dare", 16, 1), Cell("magnitude", 2000, 0))
        ]
    assert "unmet" not in rows[0]
    assert rows[0]["file_ratio"] == pytest.approx(16, rel=0.01)
    assert rows[0]["archive_bytes"] < 430_000
    assert min(rows[0][key] for key in rows[0] if key.endswith("_seconds")) > 0
    assert rows[0]["restore_peak_memory_bytes"] > 1e7
    assert rows[1]["kl"] != rows[0]["kl"]  # another seed, other positions
    assert "compress_seconds" not in rows[1]
    assert rows[2]["unmet"].startswith("File ratio 2000 cannot be met")
    assert "kl" not in rows[2]
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_defaults_of_the_command_line() -> None:
    options: argparse.Namespace = frontier.parse(["demo"])
    assert (options.ratios, options.seeds, options.rows) == ([8, 16, 32, 64, 128, 256], 3, 100)
    assert options.methods == cells.methods(lossy=True)
    assert options.calibration == "none"
