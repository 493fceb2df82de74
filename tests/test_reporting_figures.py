"""Figures: which are drawn, that they are real pictures, and the same bytes each time."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from reporting_records import (
    COMMON,
    KINDS,
    benchmark_record,
    benchmark_row,
    compress_record,
    evaluate_record,
)

from deltafold.errors import DeltafoldError, StorageError, UsageError
from deltafold.reporting.drawings.size_quality import groups_of
from deltafold.reporting.drawings.spectra import MOST_TENSORS, kind_of, representative
from deltafold.reporting.figures import figures_of
from deltafold.reporting.labels import spread
from deltafold.reporting.records import understood
from deltafold.reporting.style import METHODS, method_looks


def png_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    written = figures_of(
        [benchmark_record(), compress_record(blocks=6)], tmp_path / "new" / "figures"
    )
    assert [path.name for path in written] == [
        "size-and-quality-arithmetic.png", "bytes-by-role-math-delta.png",
        "error-by-block-math-delta.png", "spectra-math-delta.png",
    ]  # fmt: skip
    assert sorted(written) == sorted((tmp_path / "new" / "figures").iterdir())
    for path in written:
        width, height = png_size(path)
        assert 1200 < width < 2000
        assert 400 < height < 900
        assert b"Software" not in path.read_bytes()[:200]


def test_same_records_same_bytes_whatever_the_readers_settings(tmp_path: Path) -> None:
    import matplotlib as mpl

    record = benchmark_record(("impart", "dare"))
    (first,) = figures_of([record], tmp_path / "a")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9}):
        (second,) = figures_of([record], tmp_path / "b")
        assert mpl.rcParams["font.size"] == 30  # and leaves them as they were
    assert first.read_bytes() == second.read_bytes()
    record["rows"][3]["kl"] *= 2
    (third,) = figures_of([record], tmp_path / "c")
    assert third.read_bytes() != first.read_bytes()


def test_dark_figures_have_names_of_their_own(tmp_path: Path) -> None:
    record = benchmark_record(("impart",))
    (light,) = figures_of([record], tmp_path)
    (dark,) = figures_of([record], tmp_path, dark=True)
    assert dark.name == "size-and-quality-arithmetic-dark.png"
    assert light.exists()
    assert light.read_bytes() != dark.read_bytes()


def test_two_archives_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    records = [compress_record(1, f"{place}/math.delta") for place in "ab"]
    for record in records:
        record["tensors"] = [
            line | {"spectrum": None, "relative_error": None} for line in record["tensors"]
        ]
    names = [path.name for path in figures_of(records, tmp_path)]
    assert names == ["bytes-by-role-math-delta.png", "bytes-by-role-math-delta-2.png"]


SPARSE: dict[str, list[dict[str, Any]]] = {
    "no KL": [{"exact_match": 0.5}, {"exact_match": 0.4}],
    "no accuracy": [{"kl": 0.1}, {"kl": 0.4}],
    "exact and lossy": [{"kl": 0.0, "exact_match": 1.0}, {"kl": 0.4, "exact_match": 0.0}],
    "all exact": [{"kl": 0.0, "agreement": 1.0}, {"kl": 0.0, "agreement": 1.0}],
    "$ in names": [{"kl": 0.1, "method": "$x$"}, {"kl": 0.2, "method": "a_b^c"}],
    "a size below one": [{"kl": 0.1, "file_ratio": 0.5}, {"kl": 0.2, "file_ratio": 0.5}],
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_benchmarks_are_drawn(tmp_path: Path, name: str) -> None:
    rows = [
        benchmark_row("impart", None) | {"file_ratio": 8.0 * (k + 1)} | values
        for k, values in enumerate(SPARSE[name])
    ]
    (path,) = figures_of([COMMON | {"kind": "benchmark", "rows": rows}], tmp_path)
    assert png_size(path)[0] > 600


def test_nothing_to_draw(tmp_path: Path) -> None:
    rows = [benchmark_row("impart", 8.0, file_ratio=8.0), benchmark_row("impart", 9.0, kl=0.1)]
    records = [
        COMMON | {"kind": "benchmark", "rows": rows},  # no value with a size, no size with a value
        COMMON | {"kind": "benchmark", "rows": []},
        evaluate_record(),  # one archive only: no line
        COMMON | {"kind": "verify"},
        compress_record(0) | {"tensors": []},
    ]
    assert figures_of(records, tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_evaluations_of_several_archives_become_one_group() -> None:
    records = [evaluate_record(), evaluate_record()]
    records[1]["models"][2] |= {"file_ratio": 64.0, "archive_bytes": 4_200_000}
    groups = {group.title: group for group in groups_of([understood(r) for r in records])}
    assert set(groups) == {"text", "sums"}
    points = groups["sums"].points["impart"]
    assert [(ratio, scores.exact_match) for ratio, scores in points] == [(32.0, 0.91), (64.0, 0.91)]
    assert groups["sums"].references["base"].exact_match == 0.14
    assert groups["text"].points["impart"][0][1].kl == 0.04


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'deltafold\[figures\]'"):
        figures_of([benchmark_record()], tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        figures_of([benchmark_record(("impart",))], tmp_path / "file")


def test_a_bad_record_draws_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeltafoldError, match="did you mean"):
        figures_of([benchmark_record(), {"kind": "benchmarks"}], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_method_keeps_its_colour() -> None:
    alone, among = method_looks(["dare"]), method_looks(["zz", "dare", "impart", "aa"])
    assert alone["dare"] == among["dare"] == METHODS["dare"]
    assert among["zz"].label == "zz"
    for looks in (list(METHODS.values()), list(among.values())):
        for one in ("light", "dark", "mark"):
            assert len({getattr(look, one) for look in looks}) == len(looks)


def test_spread_moves_labels_no_more_than_needed() -> None:
    assert spread([0.1, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.52, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.56, 0.46])
    assert spread([0.99, 0.98], 0.1, 0.0, 1.0) == pytest.approx([1.0, 0.9])
    assert spread([], 0.1, 0.0, 1.0) == []


def test_spectra_show_one_tensor_of_each_kind() -> None:
    chosen = representative(understood(compress_record(blocks=6)).tensors)
    assert [kind_of(tensor.name) for tensor in chosen] == list(KINDS)
    assert {tensor.block for tensor in chosen} == {3}
    many = [chosen[0].model_copy(update={"name": f"a.{k}x.weight"}) for k in range(20)]
    assert len(representative(many)) == MOST_TENSORS
    assert kind_of("model.layers.11.mlp.up_proj.weight") == "mlp.up_proj"
    assert kind_of("model.embed_tokens.weight") == "embed_tokens"
