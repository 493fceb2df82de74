"""Tables: what they say, on the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

import pytest
from reporting_records import (
    COMMON,
    benchmark_record,
    benchmark_row,
    compress_record,
    evaluate_record,
    tensor,
)
from rich.console import Console

from deltafold.reporting.records import understood
from deltafold.reporting.table import Strong, Table
from deltafold.reporting.tables import relative_error, tables_of
from deltafold.reporting.units import (
    bytes_text,
    kl_text,
    number_text,
    percent_text,
    ratio_text,
    seconds_text,
    smaller_text,
)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_400, "999 kB"), (999_600, "1 MB"),
     (8_412_000, "8.41 MB"), (269_400_000, "269 MB"), (14_500_000_000, "14.5 GB"), (None, "–")],
)  # fmt: skip
def test_bytes_are_decimal_with_three_digits(n_bytes: int | None, text: str) -> None:
    assert bytes_text(n_bytes) == text


def test_numbers_in_words() -> None:
    assert smaller_text(32.08) == "32.1x smaller"
    assert smaller_text(0.8) == "1.2x larger"
    assert ratio_text(128.4) == "128x"
    assert number_text(0.04321, 0.0029) == "0.0432 ± 0.0029"
    assert number_text(12.04, 31.0) == "12 ± 31"
    assert kl_text(0.0) == "0 (exact)"
    assert kl_text(None) == "–"
    assert percent_text(0.925, 0.0187) == "92.5 ± 1.9 %"
    assert seconds_text(0.4213) == "0.421 s"
    assert seconds_text(200.2) == "3 min 20 s"


def rows_of(table: Table) -> dict[str, list[str]]:
    """Rows by their first cell, bold cells as ** **."""
    plain = [[f"**{c.text}**" if isinstance(c, Strong) else c for c in row] for row in table.rows]
    return {row[0]: row[1:] for row in plain}


def test_compress_says_size_then_roles_that_add_up() -> None:
    totals, roles, reasons = tables_of(compress_record(blocks=2))
    first = totals.rows[0]
    assert first[0] == "archive"
    assert "x smaller" in first[1]
    assert "612 MB" in totals.notes[0]
    assert "Example CPU" in totals.notes[0]

    rows = rows_of(roles)
    assert list(rows) == [
        "embedding", "attention", "mlp", "norm", "manifest and headers",
        "tokenizer and configuration", "**total**",
    ]  # fmt: skip
    # 2 blocks x (2 x 576 x 576 + 2 x 192 x 576) elements of two bytes
    assert rows["attention"][:3] == ["impart", "8", "3.54 MB"]
    assert rows["tokenizer and configuration"][2:4] == ["3.5 MB", "2.1 MB"]
    assert rows["manifest and headers"][2:4] == ["", "60 kB"]
    assert rows["norm"][5] == "–"
    assert rows_of(reasons)["a norm is small and matters"] == ["lossless", "2", "1.4 kB"]


def test_relative_error_of_several_tensors_weighs_by_their_deltas() -> None:
    record = compress_record(blocks=0)
    record["tensors"] = [
        tensor("a", "mlp", 0, (2, 2), relative_error=0.5, delta_norm=4.0),  # 2 wrong of 4
        tensor("b", "mlp", 0, (2, 2), relative_error=0.0, delta_norm=3.0),
        tensor("c", "mlp", 0, (2, 2), relative_error=None, delta_norm=9.0),  # says nothing
    ]
    assert relative_error(understood(record).tensors) == pytest.approx(2 / 5)
    assert relative_error(understood(record).tensors[2:]) is None


@pytest.mark.parametrize(
    ("dtype", "n_bytes"), [("BF16", 8), ("F32", 16), ("F8_E4M3", 4), ("BOOL", 4)]
)
def test_bytes_of_a_dtype(dtype: str, n_bytes: int) -> None:
    record = compress_record(blocks=0) | {"tensors": [tensor("a", "mlp", 0, (4,), dtype=dtype)]}
    assert understood(record).tensors[0].checkpoint_bytes == n_bytes


def test_benchmark_marks_the_best_of_each_size() -> None:
    (table,) = tables_of(benchmark_record(("impart", "magnitude", "bitdelta")))
    assert table.title == "SmolLM2-135M: arithmetic"
    kl = list(table.columns).index("KL from the fine-tune")
    bold = [(row[0], row[1]) for row in table.rows if isinstance(row[kl], Strong)]
    assert bold == [("impart", f"{asked}.0x") for asked in (4, 8, 16, 32, 64)]  # no rival: not bold
    assert [row[0] for row in table.rows[:3]] == ["base", "fine-tune", "lossless"]
    assert table.rows[0][1] == ""  # a base has no size asked for
    assert table.rows[2][kl] == "0 (exact)"
    note = table.notes[-1]
    assert "Model: SmolLM2-135M-Instruct, bf16." in note
    assert "Data: task arithmetic, rows 200." in note
    assert "Machine: Example CPU @ 2.4 GHz, 2 cores, 24 GB of memory" in note


def test_benchmark_without_a_metric_has_no_column_for_it() -> None:
    rows = [benchmark_row("impart", 8.0, file_ratio=8.1, kl=0.1),
            benchmark_row("impart", 16.0, file_ratio=16.1, kl=float("nan"))]  # fmt: skip
    record = COMMON | {"kind": "benchmark", "title": "", "rows": rows}
    (table,) = tables_of(record)
    assert list(table.columns) == ["method", "asked", "smaller", "KL from the fine-tune"]
    assert [row[3] for row in table.rows] == ["0.1", "–"]


def test_benchmark_has_a_table_a_fine_tune() -> None:
    rows = [benchmark_row("impart", 8.0, finetune=name, kl=0.1) for name in ("sums", "names")]
    tables = tables_of(COMMON | {"kind": "benchmark", "title": "T", "rows": rows})
    assert [table.title for table in tables] == ["T: sums", "T: names"]


def test_evaluation_has_a_table_for_text_and_one_a_task() -> None:
    record = evaluate_record()
    record["models"][0]["metrics"]["lm_eval"] = {
        "arc": {"acc": {"value": 0.5, "stderr": 0.1, "n": 9}}
    }
    text, task, harness = tables_of(record)
    assert [text.title, task.title, harness.title] == [
        "On text", "Task sums", "Task of lm-eval: arc",
    ]  # fmt: skip
    assert rows_of(text)["math.delta"][:4] == ["candidate", "8.4 MB", "32.0x", "12.04 ± 0.30"]
    assert rows_of(task)["base"][3] == "14.0 ± 2.0 %"
    assert rows_of(harness)["base"][3] == "0.50 ± 0.10"
    assert rows_of(harness)["math"][3] == "–"


@pytest.mark.parametrize("kind", ["restore", "verify", "plan"])
def test_other_kinds_are_keys_and_values(kind: str) -> None:
    record: dict[str, Any] = COMMON | {
        "kind": kind, "archive": "a.delta", "exact": True, "archive_bytes": 1_234_567,
        "tensors": [{"name": "a"}] * 9, "totals": {"file_ratio": 12.0}, "against": None,
    }  # fmt: skip
    (table,) = tables_of(record)
    assert rows_of(table) == {
        "archive": ["a.delta"], "exact": ["yes"], "archive_bytes": ["1.23 MB"],
        "tensors": ["9 entries"], "totals: file_ratio": ["12.0x"], "against": ["–"],
    }  # fmt: skip
    assert "83.2 s" in table.notes[0]


def test_markdown_escapes_names() -> None:
    table = Table("a|b", ("name", "n"), [("x|y <b>", Strong("1_0"))], notes=["n*"])
    assert table.markdown() == (
        "**a\\|b**\n\n| name | n |\n| :-- | --: |\n| x\\|y \\<b> | **1\\_0** |\n\nn\\*\n"
    )


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_every_cell_whole(width: int) -> None:
    """A table too wide for the terminal comes in parts, each with the columns that name a row."""
    (table,) = tables_of(benchmark_record(("impart",)))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    parts = table.rich(width)
    for part in parts:
        console.print(part)
    shown = console.export_text()
    assert (len(parts) == 1) == (width == 200)
    assert shown.count("lossless") == len(parts)
    for row in table.rows:
        for cell in row:
            assert (cell.text if isinstance(cell, Strong) else cell) in shown
