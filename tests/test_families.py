"""Every family that matters, end to end: compress, restore, load with transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint, same_bits, tree_hashes
from tiny_models import FAMILIES, write_family

from deltafold import compress, inspect, load, plan, restore, verify
from deltafold.names import block_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp("family")
    return (request.param, *write_family(folder, request.param))


Family = tuple[str, Path, Path]


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model(tokens).logits.float()


def open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_lossless_gives_the_same_model(family: Family, tmp_path: Path) -> None:
    _, base, finetuned = family
    compress(base, finetuned, tmp_path / "x.delta", "lossless")
    restore(tmp_path / "x.delta", base, tmp_path / "restored")
    original, restored = tree_hashes(finetuned), tree_hashes(tmp_path / "restored")
    assert restored == original
    assert torch.equal(logits(open_model(tmp_path / "restored")), logits(open_model(finetuned)))


@pytest.mark.parametrize("method", ["lowrank", "impart"])
def test_lossy_gives_a_nearby_model(family: Family, tmp_path: Path, method: str) -> None:
    name, base, finetuned = family
    archive, out = tmp_path / "x.delta", tmp_path / "restored"
    record = compress(base, finetuned, archive, method, file_ratio=4)
    assert record["totals"]["file_ratio"] == pytest.approx(4, rel=0.02)
    rows = {row["name"]: row for row in record["tensors"]}
    assert set(rows) == set(read_checkpoint(finetuned))
    # Every block has projections that the method itself stores, not a fallback.
    by_block = {block_of(n) for n, row in rows.items() if method in row["codec"].split("+")}
    assert {0, 1} <= by_block, name
    assert not [n for n, row in rows.items() if row["role"] == "norm" and row["relative_error"]]
    found = verify(archive, base, finetuned)
    assert found["tensors_decoded"] == len(rows)
    restore(archive, base, out)
    here, there, before = (logits(open_model(folder)) for folder in (out, finetuned, base))
    assert torch.isfinite(here).all()
    if method == "lowrank":
        assert (here - there).norm() < 0.7 * (before - there).norm()


def test_load_is_restore(family: Family, tmp_path: Path) -> None:
    """`load` builds in memory what `restore` writes, tied heads and fused experts included."""
    _, base, finetuned = family
    archive = tmp_path / "x.delta"
    compress(base, finetuned, archive, "lowrank", file_ratio=4)
    restore(archive, base, tmp_path / "restored")
    model = load(archive, base)
    assert torch.equal(logits(model), logits(open_model(tmp_path / "restored")))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_plan_lists_every_tensor(family: Family) -> None:
    _, base, finetuned = family
    found = plan(base, finetuned, file_ratio=4)
    assert sum(row["tensors"] for row in found["roles"]) == len(read_checkpoint(finetuned))
    assert found["feasible"]
    assert found["only_in_base"] == found["only_in_finetuned"] == []


def test_a_tensor_alone(family: Family, tmp_path: Path) -> None:
    _, base, finetuned = family
    archive = tmp_path / "x.delta"
    compress(base, finetuned, archive, "lossless")
    tensors = read_checkpoint(finetuned)
    wanted = [next(iter(tensors)), list(tensors)[-1]]
    restore(archive, base, tmp_path / "part", tensors=wanted)
    assert same_bits(read_checkpoint(tmp_path / "part"), {name: tensors[name] for name in wanted})
    assert {row["name"] for row in inspect(archive)["tensors"]} == set(tensors)
