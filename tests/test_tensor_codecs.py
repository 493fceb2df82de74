"""Codecs on tensors in memory, and restored tensors one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import PairFiles, decaying_delta, make_pair, read_checkpoint

import deltafold
from deltafold.codecs import get, names
from deltafold.errors import MismatchError, UsageError

METHODS = [name for name in names() if get(name).method]
LOSSY = [name for name in METHODS if get(name).lossy]
EXACT = [name for name in METHODS if not get(name).lossy]


def delta() -> torch.Tensor:
    return decaying_delta((128, 96), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [1 / 4, 1 / 32])
@pytest.mark.parametrize("name", LOSSY)
def test_a_delta_comes_back_within_its_bytes(name: str, share: float) -> None:
    codec = deltafold.codec(name, share=share)
    parts = codec.encode(delta())
    stored = sum(part.untyped_storage().nbytes() for part in parts.tensors.values())
    assert 0 < parts.n_bytes == stored <= share * 2 * 128 * 96
    found = codec.decode(parts)
    assert found.shape == (128, 96) and found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), delta().flatten(), dim=0)
    assert float(cosine) > 0.1
    again = deltafold.codec(name, share=share).encode(delta())
    assert all(torch.equal(again.tensors[part], parts.tensors[part]) for part in parts.tensors)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", [(7,), (3, 20, 24), (40, 30)])
def test_a_delta_of_zeros_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    codec = deltafold.codec(name)
    assert torch.equal(codec.decode(codec.encode(torch.zeros(shape))), torch.zeros(shape))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(9,), (2, 16, 24)])
def test_exact_codecs_give_every_bit(name: str, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    tuned = base.clone()
    tuned[0] += 1
    codec = deltafold.codec(name)
    assert torch.equal(codec.decode(codec.encode(tuned, base=base), base=base), tuned)


def test_mistakes_get_one_sentence() -> None:
    for wrong in (
        lambda: deltafold.codec("lowrnak"),
        lambda: deltafold.codec("lowrank", share=2),
        lambda: deltafold.codec("lowrank", betta=1),
        lambda: deltafold.codec("lossless", share=1 / 4),
        lambda: deltafold.codec("lossless").encode(torch.zeros(3, 3)),
        lambda: deltafold.codec("lossless").encode(torch.zeros(3, 3), base=torch.zeros(3, 4)),
        lambda: deltafold.codec("lowrank").encode(torch.zeros(3, 3), base=torch.zeros(3, 3)),
        lambda: deltafold.codec("lowrank").encode(torch.full((3, 3), float("nan"))),
        lambda: deltafold.codec("dare").decode(deltafold.codec("lowrank").encode(torch.ones(3, 3))),
    ):
        with pytest.raises(UsageError):
            wrong()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> PairFiles:
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_tensors_are_what_restore_writes(pair: PairFiles, tmp_path: Path) -> None:
    archive = tmp_path / "a.delta"
    deltafold.compress(pair.base, pair.finetuned, archive, "dare", file_ratio=4)
    deltafold.restore(archive, pair.base, tmp_path / "restored")
    restored = read_checkpoint(tmp_path / "restored")
    found = dict(deltafold.tensors(archive, base=pair.base))
    assert found.keys() == restored.keys()
    assert [name for name in found if not torch.equal(found[name], restored[name])] == []
    some = ["model.norm.weight", "model.norm.weight"]
    assert [name for name, _ in deltafold.tensors(archive, pair.base, names=some)] == some[:1]


def test_tensors_refuses_a_wrong_base_and_a_wrong_name(pair: PairFiles, tmp_path: Path) -> None:
    archive = tmp_path / "a.delta"
    deltafold.compress(pair.base, pair.finetuned, archive, "lossless")
    with pytest.raises(MismatchError, match="is not the base"):
        dict(deltafold.tensors(archive, base=pair.finetuned))
    with pytest.raises(UsageError, match=r"no tensor .model\.nrom\.weight"):
        dict(deltafold.tensors(archive, base=pair.base, names=["model.nrom.weight"]))
