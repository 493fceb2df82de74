"""Checkpoints that are broken or hostile: refused when opened, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PairFiles, make_pair, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import nothing_left, refused
from safetensors.torch import save_file

from deltafold import compress
from deltafold.checkpoint import Checkpoint
from deltafold.errors import CheckpointError, DeltafoldError

INDEX = "model.safetensors.index.json"


def raw_file(path: Path, header: object, payload: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def entry(start: Any, end: Any, shape: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> PairFiles:
    return make_pair(tmp_path, shards=3)


def test_missing_shard(sharded: PairFiles, tmp_path: Path) -> None:
    (sharded.finetuned / "model-00002-of-00003.safetensors").unlink()
    out = tmp_path / "out.delta"
    refused(
        CheckpointError,
        lambda: compress(sharded.base, sharded.finetuned, out),
        "model-00002-of-00003.safetensors",
        "missing",
    )
    nothing_left(out)


def test_truncated_shard(sharded: PairFiles, tmp_path: Path) -> None:
    shard = sharded.base / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    out = tmp_path / "out.delta"
    refused(
        CheckpointError,
        lambda: compress(sharded.base, sharded.finetuned, out),
        shard.name,
        "100 bytes are missing",
    )
    nothing_left(out)


def test_bytes_after_the_end(pair: PairFiles) -> None:
    file = pair.base / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"12345")
    refused(CheckpointError, lambda: Checkpoint(pair.base), file.name, "5 bytes too many")


@pytest.mark.parametrize("length", [0, 3, 8, 50])
def test_file_cut_off_in_the_header(pair: PairFiles, length: int) -> None:
    file = pair.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(CheckpointError, lambda: Checkpoint(pair.base), file.name)


def test_index_promises_what_is_not_there(sharded: PairFiles) -> None:
    index = sharded.base / INDEX
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(raw))
    refused(CheckpointError, lambda: Checkpoint(sharded.base), "model.extra.weight", "index")


@pytest.mark.parametrize(
    "name", ["../finetuned/model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 7]
)
def test_index_escaping_its_folder(sharded: PairFiles, name: object) -> None:
    index = sharded.base / INDEX
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(raw))
    refused(CheckpointError, lambda: Checkpoint(sharded.base), INDEX)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": []}}', "[" * 100_000, "\0"]
)
def test_index_that_is_no_index(sharded: PairFiles, text: str) -> None:
    (sharded.base / INDEX).write_text(text)
    refused(CheckpointError, lambda: Checkpoint(sharded.base), INDEX)


def test_index_of_pickles(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    refused(CheckpointError, lambda: Checkpoint(tmp_path), "pytorch_model.bin", "safetensors")


def test_folder_with_pickles_only(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refused(CheckpointError, lambda: Checkpoint(tmp_path), "pytorch_model.bin", "pickle")


def test_empty_folder(tmp_path: Path) -> None:
    refused(CheckpointError, lambda: Checkpoint(tmp_path), str(tmp_path))


def test_shard_that_is_a_folder(sharded: PairFiles) -> None:
    shard = sharded.base / "model-00001-of-00003.safetensors"
    shard.unlink()
    shard.mkdir()
    refused(CheckpointError, lambda: Checkpoint(sharded.base), shard.name)


HEADERS: dict[str, tuple[Any, bytes]] = {
    "no JSON": (b"\xff\xfe garbage", b""),
    "a list": ([1, 2], b""),
    "a number": (b"12", b""),
    "deeply nested": (b"[" * 200_000, b""),
    "entry is no object": ({"x": 3}, b""),
    "no offsets": ({"x": {"dtype": "U8", "shape": [1]}}, b"1"),
    "unknown dtype": ({"x": entry(0, 1, [1], "PICKLE")}, b"1"),
    "dtype is a list": ({"x": entry(0, 1, [1], ["U8"])}, b"1"),
    "negative offset": ({"x": entry(-1, 0, [1])}, b"1"),
    "negative shape": ({"x": entry(0, 1, [-1, -1])}, b"1"),
    "shape of fractions": ({"x": entry(0, 1, [1.5])}, b"1"),
    "shape of truths": ({"x": entry(0, 1, [True])}, b"1"),
    "shape is infinite": (b'{"x":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,1]}}', b"1"),
    "shape is text": ({"x": entry(0, 1, "1")}, b"1"),
    "absurd shape": ({"x": entry(0, 1, [10**12, 10**12])}, b"1"),
    "absurd size": ({"x": entry(0, 10**24, [10**12, 10**12])}, b"1"),
    "overlapping": ({"x": entry(0, 2, [2]), "y": entry(1, 3, [2])}, b"123"),
    "same place": ({"x": entry(0, 2, [2]), "y": entry(0, 2, [2])}, b"12"),
    "a hole": ({"x": entry(0, 1, [1]), "y": entry(2, 3, [1])}, b"123"),
    "past the end": ({"x": entry(0, 8, [8])}, b"12"),
    "swapped offsets": ({"x": entry(1, 0, [1])}, b"1"),
    "metadata is no object": ({"__metadata__": [1], "x": entry(0, 1, [1])}, b"1"),
    "metadata is no text": ({"__metadata__": {"a": {}}, "x": entry(0, 1, [1])}, b"1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_header(tmp_path: Path, case: str) -> None:
    header, payload = HEADERS[case]
    file = raw_file(tmp_path / "model.safetensors", header, payload)
    refused(CheckpointError, lambda: Checkpoint(tmp_path), str(file))


def test_header_whose_length_looks_like_another_format(tmp_path: Path) -> None:
    """640 bytes of header begin with the two bytes that a pickle begins with."""
    length = 0x0280
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\x07")
    with Checkpoint(tmp_path) as found:
        assert found.tensor("x").tolist() == [7]


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(CheckpointError, lambda: Checkpoint(tmp_path), file.name, "header is cut off")


def test_tensor_twice_in_one_header(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 0, [0])).encode()
    raw_file(tmp_path / "model.safetensors", b'{"x":%s,"x":%s}' % (one, one))
    refused(CheckpointError, lambda: Checkpoint(tmp_path), "x is listed twice")


def test_tensor_in_two_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    refused(
        CheckpointError, lambda: Checkpoint(tmp_path), "x twice", "a.safetensors", "b.safetensors"
    )


def test_config_that_is_no_json(pair: PairFiles, tmp_path: Path) -> None:
    (pair.base / "config.json").write_text("{")
    out = tmp_path / "out.delta"
    refused(CheckpointError, lambda: compress(pair.base, pair.finetuned, out), "config.json")
    nothing_left(out)


def test_file_that_shrinks_while_it_is_read(pair: PairFiles) -> None:
    with Checkpoint(pair.base) as checkpoint:
        file = pair.base / "model.safetensors"
        last = list(checkpoint.tensors)[-1]
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size - 10)
        refused(CheckpointError, lambda: checkpoint.tensor(last), last, file.name)


@given(header=st.binary(max_size=60), payload=st.binary(max_size=8))
@settings(max_examples=60, deadline=None)
def test_random_bytes(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, payload: bytes
) -> None:
    folder = tmp_path_factory.mktemp("random")
    raw_file(folder / "model.safetensors", header, payload)
    open_or_refuse(lambda: Checkpoint(folder))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    fields=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "BF16", "X"]) | json_values,
            "shape": st.lists(st.integers(-1, 4) | json_values, max_size=3) | json_values,
            "data_offsets": st.lists(st.integers(-1, 8) | json_values, max_size=3) | json_values,
        }
    ),
    metadata=json_values,
)
@settings(max_examples=100, deadline=None)
def test_random_headers(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], metadata: Any
) -> None:
    folder = tmp_path_factory.mktemp("random")
    raw_file(folder / "model.safetensors", {"__metadata__": metadata, "x": fields}, b"12345678")
    open_or_refuse(lambda: Checkpoint(folder))


def open_or_refuse(action: Callable[[], Checkpoint]) -> None:
    """Whatever the bytes: a checkpoint whose tensors can be read, or one sentence."""
    try:
        with action() as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.tensor(name)
    except DeltafoldError as error:
        assert type(error) is CheckpointError
        assert "\n" not in str(error)


def test_written_pair_is_fine_without_edits(tmp_path: Path) -> None:
    """The refusals above are due to the edits: the same files unedited are read."""
    folder = write_checkpoint(tmp_path / "fine", {"x": torch.ones(2), "y": torch.ones(3)}, shards=2)
    assert sorted(Checkpoint(folder).tensors) == ["x", "y"]
