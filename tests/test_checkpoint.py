"""Reading and writing checkpoints, against the safetensors library."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import PairFiles, make_pair, read_checkpoint, same_bits, write_checkpoint
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltafold.checkpoint import (
    DTYPE_NAMES,
    DTYPES,
    Checkpoint,
    CheckpointWriter,
    local_folder,
    open_checkpoint,
    plan_shards,
    tensor_bytes,
)
from deltafold.dtypes import held_shape, stored_bytes
from deltafold.errors import CheckpointError

ODD = {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0),
    "no.rows": torch.zeros(0, 8, dtype=torch.bfloat16),
    "no.columns": torch.zeros(8, 0),
    "flags": torch.tensor([True, False, True]),
    "counts": torch.arange(7, dtype=torch.int64),
    "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "experts": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
}


def all_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_the_library_reads(tmp_path: Path, shards: int) -> None:
    pair = make_pair(tmp_path, shards=shards)
    with Checkpoint(pair.finetuned) as checkpoint:
        assert len(checkpoint.shards) == shards
        assert same_bits(all_tensors(checkpoint), pair.tensors)
        assert checkpoint.metadata == {"format": "pt"}


def test_odd_shapes_and_dtypes(tmp_path: Path) -> None:
    save_file(ODD, tmp_path / "odd.safetensors")
    with Checkpoint(tmp_path / "odd.safetensors") as checkpoint:
        assert same_bits(all_tensors(checkpoint), ODD)
        assert checkpoint.tensors["experts"].matrix_shape == (6, 4)
        assert checkpoint.tensors["counts"].matrix_shape == (1, 7)
        assert checkpoint.tensors["scalar"].matrix_shape == (1, 1)
        assert checkpoint.tensors["empty"].matrix_shape == (1, 0)


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    chunk_bytes=st.integers(1, 64),
)
@settings(max_examples=40, deadline=None)
def test_chunks_cover_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: str, chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    assume(dtype not in ("F4", "F6_E2M3", "F6_E3M2") or torch.Size(shape).numel() % 4 == 0)
    raw = (torch.arange(stored_bytes(dtype, tuple(shape))) % 2).to(
        torch.uint8
    )  # 0 and 1 are valid in every dtype
    tensor = raw.view(DTYPES[dtype]).reshape(held_shape(dtype, tuple(shape)))
    writer = CheckpointWriter(folder, {"model.safetensors": [("x", dtype, tuple(shape))]})
    writer.write("x", tensor)
    writer.finish()
    with Checkpoint(folder) as checkpoint:
        chunks = list(checkpoint.row_chunks("x", chunk_bytes))
        n_rows, columns = checkpoint.tensors["x"].matrix_shape
        starts = [start for start, _ in chunks]
        assert starts == [sum(len(rows) for _, rows in chunks[:k]) for k in range(len(chunks))]
        assert sum(len(rows) for _, rows in chunks) == n_rows
        assert b"".join(tensor_bytes(rows) for _, rows in chunks) == raw.numpy().tobytes()
        assert all(rows.shape[1] == columns for _, rows in chunks)


def test_rows_outside_the_tensor_are_refused(pair: PairFiles) -> None:
    with Checkpoint(pair.base) as checkpoint, pytest.raises(ValueError, match="512 rows"):
        checkpoint.rows("model.embed_tokens.weight", 510, 513)


def test_writer_in_any_order_from_threads(tmp_path: Path) -> None:
    tensors = {f"t{k}": torch.randn(k + 1, 16) for k in range(8)} | ODD
    specs = [(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    layout = plan_shards(specs, 1000)
    assert len(layout) > 1
    writer = CheckpointWriter(tmp_path, layout, {"format": "pt"})
    threads = [
        threading.Thread(target=writer.write, args=(name, tensor))
        for name, tensor in reversed(tensors.items())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.finish()
    assert same_bits(read_checkpoint(tmp_path), tensors)
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
    with safe_open(tmp_path / next(iter(layout)), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_written_file_has_the_library_s_bytes(tmp_path: Path) -> None:
    """Same names, order and metadata: same bytes, so that a lossless restore keeps the hash."""
    pair = make_pair(tmp_path)
    with Checkpoint(pair.finetuned) as checkpoint:
        specs = [(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values()]
        writer = CheckpointWriter(tmp_path, {"again.safetensors": specs}, checkpoint.metadata)
        for name in checkpoint.tensors:
            writer.write(name, checkpoint.tensor(name))
        writer.finish()
    original = (pair.finetuned / "model.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == original


def test_shards_hold_at_most_what_was_asked() -> None:
    specs = [(f"t{k}", "F32", (10,)) for k in range(10)] + [("large", "F32", (1000,))]
    layout = plan_shards(specs, 100)
    assert [spec for group in layout.values() for spec in group] == specs
    sizes = [sum(4 * spec[2][0] for spec in group) for group in layout.values()]
    assert max(sizes[:-1]) <= 100
    assert sizes[-1] == 4000
    assert next(iter(layout)) == "model-00001-of-00006.safetensors"


def test_single_file_comes_before_shards(tmp_path: Path) -> None:
    """The same precedence as transformers': leftover shards beside model.safetensors are ignored."""
    folder = write_checkpoint(tmp_path / "both", {"x": torch.ones(2)})
    save_file({"y": torch.ones(2)}, folder / "other.safetensors")
    assert list(Checkpoint(folder).tensors) == ["x"]


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file({"x": torch.ones(2)}, folder / "a.safetensors")
    (folder / "._a.safetensors").write_bytes(b"resource fork")
    (folder / "._model.py").write_bytes(b"resource fork")
    (folder / "tokenizer_files").mkdir()
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint(folder)
    assert list(checkpoint.tensors) == ["x"]
    assert [file.name for file in checkpoint.side_files] == ["config.json"]


def test_names_with_spaces_and_accents_are_fine(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "modèle final.safetensors")
    assert list(Checkpoint(tmp_path).tensors) == ["x"]


def test_fingerprint_follows_files(pair: PairFiles) -> None:
    before = Checkpoint(pair.base).fingerprint()
    assert Checkpoint(pair.base).fingerprint() == before
    (pair.base / "config.json").write_text("{}")
    assert Checkpoint(pair.base).fingerprint() != before


def test_total_bytes_counts_everything(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, shards=2)
    on_disk = sum(file.stat().st_size for file in pair.finetuned.iterdir())
    assert Checkpoint(pair.finetuned).total_bytes == on_disk


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    refused(CheckpointError, lambda: local_folder(tmp_path / "nowhere"), "nowhere", "hub id")


def test_a_single_file_is_a_checkpoint(pair: PairFiles) -> None:
    file = pair.finetuned / "model.safetensors"
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.side_files == []
        assert checkpoint.total_bytes == file.stat().st_size
        assert same_bits(all_tensors(checkpoint), load_file(file))
