"""Records that cannot be shown get one sentence; Markdown pages keep what is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reporting_records import benchmark_record, compress_record, evaluate_record

from deltafold.errors import DeltafoldError, StorageError, UsageError
from deltafold.reporting.markdown import page, rewrite_block, write_text
from deltafold.reporting.records import read_records, understood
from deltafold.reporting.records.compress import CompressRecord
from deltafold.reporting.table import Table


def written(path: Path, record: Any) -> Path:
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def test_a_record_is_found_beside_its_archive(tmp_path: Path) -> None:
    written(tmp_path / "math.delta.record.json", compress_record(blocks=1))
    (record,) = read_records([tmp_path / "math.delta"])
    assert isinstance(record, CompressRecord)
    assert record.title == "math.delta"


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is not a record"),
    "a list": ([1], "is not a record"),
    "newer": (compress_record(0) | {"record_version": 2}, "newer deltafold"),
    "wrong kind": (compress_record(0) | {"kind": "kompress"}, "did you mean 'compress'"),
    "no kind": (without(compress_record(0), "kind"), "of kind None"),
    "no totals": (without(compress_record(0), "totals"), "field totals"),
    "rows of text": (benchmark_record() | {"rows": ["impart"]}, "field rows.0"),
    "a wrong number": (
        evaluate_record() | {"models": [{"label": "m", "metrics": {"perplexity": 3.0}}]},
        "field models.0.metrics.perplexity",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(tmp_path: Path, name: str) -> None:
    content, sentence = BAD[name]
    path = written(tmp_path / "bad.json", content)
    with pytest.raises(DeltafoldError) as caught:
        read_records([path])
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeltafoldError, match="has no record"):
        read_records([tmp_path / "nothing.delta"])


def test_unknown_fields_are_left_alone() -> None:
    record = compress_record(blocks=1) | {"later": {"more": 1}}
    assert understood(record) == understood(compress_record(blocks=1))


PAGE = "# Title\r\n\r\n<!-- sizes:begin -->\r\nold\r\n<!-- sizes:end -->\r\ntail\r\n"


def test_a_block_is_rewritten_and_the_rest_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(PAGE.encode())
    rewrite_block(readme, "sizes", "| new |\n")
    once = readme.read_bytes()
    assert once == (
        b"# Title\r\n\r\n<!-- sizes:begin -->\n\n| new |\n\n<!-- sizes:end -->\r\ntail\r\n"
    )
    rewrite_block(readme, "sizes", "| new |\n")
    assert readme.read_bytes() == once
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no markers", "has 0 lines <!-- sizes:begin -->"),
        ("<!-- sizes:begin -->", "has 0 lines <!-- sizes:end -->"),
        (PAGE + PAGE, "has 2 lines <!-- sizes:begin -->"),
        ("<!-- sizes:end --> <!-- sizes:begin -->", "swap them"),
    ],
)
def test_markers_that_are_not_there_once(tmp_path: Path, text: str, sentence: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(text.encode())
    with pytest.raises(UsageError, match=sentence):
        rewrite_block(readme, "sizes", "new")
    assert readme.read_bytes() == text.encode()


def test_a_page_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read as text"):
        rewrite_block(tmp_path / "none.md", "sizes", "new")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / "file" / "page.md", "text")


def test_figures_are_linked_from_where_the_page_lies(tmp_path: Path) -> None:
    table = Table("T", ("a",), [("1",)])
    text = page([table], [tmp_path / "figures" / "size-and-quality-x.png"], tmp_path / "docs")
    assert text.startswith("**T**\n")
    assert text.endswith("![size and quality x](<../figures/size-and-quality-x.png>)\n")
