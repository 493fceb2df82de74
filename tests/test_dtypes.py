"""Dtypes that newer files have: bits to exact methods, whatever they stand for."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from refusals import edit_manifest, refused

from deltafold import compress, restore, tensors, verify
from deltafold.archive import read_manifest
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.header import read_header
from deltafold.dtypes import BITS, DTYPE_NAMES, DTYPES, FLOATING, matrix_shape
from deltafold.errors import ArchiveError, CheckpointError, MismatchError
from deltafold.restoring.load import load_state

SIZES = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64, "F4": 4}
SIZES |= {"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8}
SHAPES = {"matrix": [32, 64], "stack": [3, 16, 24], "vector": [40], "rows inside bytes": [8, 3]}


def write(folder: Path, scales: dict[str, tuple[str, list[int], bytes]], seed: int) -> Path:
    """A folder whose file is made by hand: a bf16 matrix, and tensors as (dtype, shape, bytes)."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) + 0.01 * seed
    held = {"up.weight": ("BF16", [64, 64], weight.bfloat16().view(torch.uint8).numpy())}
    header, payload = {}, b""
    for name, (dtype, shape, data) in (held | scales).items():
        offsets = [len(payload), len(payload) + len(bytes(data))]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        payload += bytes(data)
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return folder


def values(dtype: str, shape: list[int], seed: int) -> bytes:
    """Any bits at all, of which a few change with the seed."""
    n_bytes = torch.Size(shape).numel() * SIZES[dtype] // 8
    data = torch.randint(
        0, 256, (n_bytes,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    if dtype in FLOATING:
        data &= 0x3F  # no NaN
    data[::7] += seed
    return data.numpy().tobytes()


def content(folder: Path) -> bytes:
    return b"".join(
        bytes(Checkpoint(folder).data(name))
        for name in Checkpoint(folder).tensors
        if name != "up.weight"
    )


@pytest.mark.parametrize("method", ["lossless", "sparse-patch", "lowrank", "auto"])
@pytest.mark.parametrize("dtype", SIZES)
def test_every_bit_comes_back(dtype: str, method: str, tmp_path: Path) -> None:
    base, tuned = (
        write(tmp_path / str(n), {k: (dtype, s, values(dtype, s, n)) for k, s in SHAPES.items()}, n)
        for n in (0, 1)
    )
    archive, out = tmp_path / "a.delta", tmp_path / "out"
    more = {"nominal_ratio": 4, "calibration": "none"} if method in ("lowrank", "auto") else {}
    compress(base, tuned, archive, method, **more)
    restore(archive, base, out)
    verify(archive, base, tuned)
    assert content(out) == content(tuned) != content(base)
    loaded = load_state(archive, base)
    assert {n: x.dtype for n, x in tensors(archive, base)} == {
        n: x.dtype for n, x in loaded.items()
    }
    names = {"F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "F4": "float4_e2m1fn_x2"}
    for name, shape in SHAPES.items():
        held = loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert held == values(dtype, shape, 1)
        if wanted := getattr(torch, names.get(dtype, ""), None):
            assert loaded[name].dtype == wanted
    assert read_manifest(archive).format_version == (2 if dtype in BITS or more else 1)


def test_older_versions_are_told_to_be_upgraded(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(n), {"s": ("F8_E8M0", [4], b"1234")}, n) for n in (0, 1)]
    compress(*folders, tmp_path / "a.delta", "lossless")
    edit_manifest(tmp_path / "a.delta", lambda raw: raw.update(format_version=1))
    refused(ArchiveError, lambda: read_manifest(tmp_path / "a.delta"), "newer dtypes")


def test_another_dtype_in_the_base_is_no_reference(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"s": ("U8", [64], bytes(64))}, 0)
    tuned = write(tmp_path / "tuned", {"s": ("F4", [64, 2], bytes(range(64)))}, 1)
    compress(base, tuned, tmp_path / "a.delta", "lossless")
    restore(tmp_path / "a.delta", base, tmp_path / "out")
    assert content(tmp_path / "out") == bytes(range(64))


def test_scales_against_floats_are_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"s": ("BF16", [64], bytes(128))}, 0)
    tuned = write(tmp_path / "tuned", {"s": ("F8_E8M0", [64], bytes(64))}, 1)
    refused(MismatchError, lambda: compress(base, tuned, tmp_path / "a", "lossless"), "unquantised")


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", {"scale": ("F3", [8], b"123")}, 0)
    said = refused(CheckpointError, lambda: Checkpoint(folder), "scale", "F3", "upgrade")
    assert "copy" not in said
    folder = write(tmp_path / "y", {"scale": ("F4", [3], b"12")}, 0)
    refused(CheckpointError, lambda: read_header(folder / "model.safetensors"), "whole bytes")


def test_tables_of_dtypes_agree() -> None:
    assert all(DTYPE_NAMES[DTYPES[name]] == name for name in DTYPES if name not in BITS)
    assert not BITS & FLOATING
    assert matrix_shape("F6_E2M3", (5, 8)) == (5, 6)
