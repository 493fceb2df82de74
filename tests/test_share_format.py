"""The folder of a composed model: what is stored, and that it loads with and without deltafold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from processes import Processes
from safetensors import safe_open
from sharing_models import IDS, any_form, random_factors, write_composed
from tiny_models import FAMILIES

import deltafold
from deltafold.checkpoint import open_checkpoint
from deltafold.composed.form import Form, Linear, Part, read_form
from deltafold.composed.load import load_shared
from deltafold.composed.modeling import ComposedLinear, LowRank, compose
from deltafold.composed.write import (
    Source,
    dense_weight,
    shared_specs,
    stored_bytes,
    write_shared,
)
from deltafold.errors import CheckpointError, UsageError


def test_a_layer_by_hand() -> None:
    anchor = torch.nn.Linear(2, 3, bias=False)
    anchor.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    entry = {"shape": (3, 2), "weight": "anchor", "bias": True}
    parts = [LowRank(2, 2, 1, None, None), LowRank(1, 2, 1, None, None)]
    layer = ComposedLinear(entry, anchor, parts)
    parts[0].a.data, parts[0].b.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    parts[1].a.data, parts[1].b.data = torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0]])
    layer.bias.data = torch.tensor([0.5, 0.0, 0.0])
    # anchor x = (1, 1, 2); A x = 3 and 5; B A x = (3, 9) and 10
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [4.5, 10.0, 12.0]
    assert layer.dense_weight().tolist() == [[2.0, 2.0], [3.0, 7.0], [11.0, 1.0]]
    assert set(layer.state_dict()) == {
        "bias", "delta.0.a", "delta.0.b", "delta.1.a", "delta.1.b"
    }  # fmt: skip


def test_a_borrowed_factor_is_owned_once() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False)
    )
    part = Part(rows=6, rank=2)
    form = Form(
        linears={
            "0": Linear(shape=(6, 4), parts=(part,)),
            "1": Linear(shape=(6, 4), parts=(Part(rows=6, rank=2, a="0.delta.0"),)),
        }
    )
    compose(model, form.to_json())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == form.owned()
    assert model[1].delta[0].factors()[0] is model[0].delta[0].a
    model.double()
    assert model[1].delta[0].factors()[0].dtype == torch.float64


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_both_ways_and_takes_what_its_specs_say(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    form = write_composed(tmp_path, family, shard_bytes=100_000)
    ours = deltafold.load(tmp_path / "shared", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shared", trust_remote_code=True, dtype=torch.float32
    ).eval()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    with open_checkpoint(tmp_path / "base") as checkpoint:
        source = Source.of(checkpoint)
        specs = shared_specs(source, form)
        write_shared(source, form, random_factors(form).__getitem__, tmp_path / "dense", dense=True)
    files = sorted((tmp_path / "shared").glob("*.safetensors"))
    assert len(files) > 1
    assert sum(map(_data_bytes, files)) == stored_bytes(specs)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        math.prod(shape) for _, _, shape in specs
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(dense).__name__ == type(theirs).__name__.removeprefix("Deltafold")
    difference = (dense(IDS).logits - ours(IDS).logits).abs().max()
    assert difference < 0.02 * ours(IDS).logits.abs().max()
    written = [
        model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached)
        for model in (ours, theirs)
        for cached in (True, False)
    ]
    assert all(torch.equal(each, written[0]) for each in written)


def _data_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


@pytest.mark.integration
def test_shared_tensors_are_stored_once_and_borrowed_factors_too(tmp_path: Path) -> None:
    """Block 1 owns a basis that blocks 2 and 3 use; nothing is left of their own weights."""
    name = "model.layers.{}.mlp.up_proj"
    owner = Linear(shape=(96, 64), parts=(Part(rows=96, rank=4),))
    guest = Linear(shape=(96, 64), parts=(Part(rows=96, rank=4, a=name.format(1) + ".delta.0"),))
    form = Form(linears={name.format(n): owner if n == 1 else guest for n in (1, 2, 3)})
    write_composed(tmp_path, "llama", form)
    with safe_open(tmp_path / "shared" / "model.safetensors", "pt") as file:
        held = {key for key in file.keys() if "up_proj" in key and ".0.up" not in key}  # noqa: SIM118
    mine = {key for key in held if any(f"layers.{n}." in key for n in (1, 2, 3))}
    assert mine == set(form.owned())
    model = load_shared(tmp_path / "shared")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        dense = dense_weight(
            Source.of(checkpoint),
            form,
            dict(model.state_dict()).__getitem__,
            name.format(3),
            form.linears[name.format(3)],
            {},
        )
    assert torch.equal(dense, model.get_submodule(name.format(3)).dense_weight())


@pytest.mark.integration
def test_it_loads_where_deltafold_is_not_installed(tmp_path: Path, processes: Processes) -> None:
    write_composed(tmp_path, "llama")
    script = (
        "import sys; sys.modules['deltafold'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'shared')!r}, "
        "trust_remote_code=True, dtype=torch.float32).eval()\n"
        "print(float(m(torch.arange(3, 27)[None]).logits.double().sum()))\n"
    )
    made = processes.run("-c", script)
    assert made.returncode == 0, made.stderr[-2000:]
    ours = deltafold.load(tmp_path / "shared", dtype=torch.float32)
    assert float(made.stdout.split()[-1]) == pytest.approx(float(ours(IDS).logits.double().sum()))


def test_a_form_that_is_damaged_is_refused_by_name() -> None:
    good = any_form("llama").to_json()
    assert read_form({"deltafold": good}, "x") == any_form("llama")
    assert read_form({}, "x") is None
    bad = json.loads(json.dumps(good))
    next(iter(bad["linears"].values()))["parts"][0]["rows"] = 3
    with pytest.raises(CheckpointError, match="rows of its parts do not add up"):
        read_form({"deltafold": bad}, "x")


@pytest.mark.integration
def test_a_folder_that_lacks_a_factor_is_refused(tmp_path: Path) -> None:
    form = write_composed(tmp_path, "llama")
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    name, entry = next(iter(config["deltafold"]["linears"].items()))
    entry["parts"] += [{"rows": 8, "rank": 1, "a": None, "b": None}]
    entry["shape"][0] += 8
    (tmp_path / "shared" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="delta"):
        load_shared(tmp_path / "shared")
    assert name in form.linears


def test_an_archive_wants_its_base(archive: Path) -> None:
    with pytest.raises(UsageError, match="base"):
        deltafold.load(archive)
