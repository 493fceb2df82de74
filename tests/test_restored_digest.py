"""What was approximated has a digest of what it restores to: other bits never pass as the fine-tune."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import PairFiles, read_checkpoint, same_bits
from refusals import edit_manifest

import deltafold.restoring.decode
from deltafold import compress, restore, tensors, verify
from deltafold.archive import read_manifest
from deltafold.checkpoint import DTYPE_NAMES
from deltafold.codecs import get, names
from deltafold.errors import ArchiveError
from deltafold.restoring.load import load_state

LOSSY = [name for name in names() if get(name).lossy and get(name).method]


def checksum(tensor: torch.Tensor) -> str:
    head = f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + data).hexdigest()[:16]


@pytest.fixture
def spread(tmp_path: Path, make_pair) -> PairFiles:
    """Tensors of several pieces: a vocabulary that has grown, a stack of experts; and a twin."""

    def edit(base, tuned):
        name = "model.embed_tokens.weight"
        tuned[name] = torch.cat([tuned[name], tuned[name][:8] + 1])
        base["model.layers.0.mlp.experts.up"] = torch.randn(3, 64, 32).bfloat16()
        tuned["model.layers.0.mlp.experts.up"] = (
            base["model.layers.0.mlp.experts.up"] + torch.randn(3, 64, 32) * 0.01
        ).bfloat16()
        tuned["lm_head.weight"] = tuned[name].clone()

    return make_pair(tmp_path, edit=edit)


@pytest.mark.integration
@pytest.mark.parametrize("method", LOSSY)
def test_each_approximated_tensor_says_what_it_restores_to(
    method: str, spread: PairFiles, tmp_path: Path
) -> None:
    archive = tmp_path / "a.delta"
    ratio = {"file_ratio": 4, "calibration": "none"}
    compress(spread.base, spread.finetuned, archive, method, **ratio)
    restore(archive, spread.base, tmp_path / "restored")
    found = read_checkpoint(tmp_path / "restored")
    manifest = read_manifest(archive)
    lossy = [tensor for tensor in manifest.tensors if tensor.lossy]
    assert manifest.format_version == 3
    assert max(len(tensor.pieces) for tensor in lossy) > 1
    for tensor in manifest.tensors:
        expected = checksum(found[tensor.name]) if tensor.lossy else None
        assert tensor.restored == expected
    assert same_bits(load_state(archive, spread.base), found)
    assert verify(archive, spread.base, spread.finetuned)["tensors_decoded"] == len(found)


def test_an_exact_archive_stays_readable_by_older_versions(pair: PairFiles, tmp_path: Path) -> None:
    """Where no small file is stored relative to the base's."""
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(pair.base / file, pair.finetuned / file)
    compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless")
    raw = json.loads((tmp_path / "x.delta" / "delta.json").read_text())
    assert raw["format_version"] == 1 and all("restored" not in entry for entry in raw["tensors"])


def test_an_archive_of_version_1_is_read(archive: Path, pair: PairFiles, tmp_path: Path) -> None:
    restore(archive, pair.base, tmp_path / "now")

    def older(raw):
        raw["format_version"] = 1
        for entry in raw["files"]:
            entry.pop("frame", None)
        for entry in raw["tensors"]:
            entry.pop("restored", None)

    edit_manifest(archive, older)
    restore(archive, pair.base, tmp_path / "then")
    assert same_bits(read_checkpoint(tmp_path / "now"), read_checkpoint(tmp_path / "then"))


def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one matrix is off by a bit, as if something here computed in another way."""
    real = deltafold.restoring.decode._decoded_piece

    def decoded(archive, tensor, piece, base):
        for start, rows in real(archive, tensor, piece, base):
            if tensor.name.endswith("layers.1.self_attn.q_proj.weight") and not start:
                rows.view(torch.int16)[0, 0] ^= 1
            yield start, rows

    monkeypatch.setattr(deltafold.restoring.decode, "_decoded_piece", decoded)


@pytest.mark.parametrize("verb", ["restore", "load", "verify", "one tensor", "tensors"])
def test_other_bits_are_refused(
    verb: str, archive: Path, pair: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_bits(monkeypatch)
    name, out = "model.layers.1.self_attn.q_proj.weight", tmp_path / "out"
    calls = {
        "restore": lambda: restore(archive, pair.base, out),
        "load": lambda: load_state(archive, pair.base),
        "verify": lambda: verify(archive, pair.base),
        "tensors": lambda: dict(tensors(archive, pair.base)),
        "one tensor": lambda: restore(archive, pair.base, out, tensors=[name]),
    }
    with pytest.raises(ArchiveError, match=f"{name} .* other values .* verify"):
        calls[verb]()
    assert not out.exists()


def test_a_twin_is_checked_too(
    spread: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(spread.base, spread.finetuned, tmp_path / "a.delta", "lowrank", file_ratio=4)
    twin = next(t for t in read_manifest(tmp_path / "a.delta").tensors if t.same_as)
    source = next(t for t in read_manifest(tmp_path / "a.delta").tensors if t.name == twin.same_as)
    assert source.restored and not twin.restored
    real = deltafold.restoring.decode._decoded_piece

    def decoded(*arguments):
        for start, rows in real(*arguments):
            yield start, rows + 1

    monkeypatch.setattr(deltafold.restoring.decode, "_decoded_piece", decoded)
    with pytest.raises(ArchiveError, match=f"{twin.name} .* other values"):
        restore(tmp_path / "a.delta", spread.base, tmp_path / "out", tensors=[twin.name])
