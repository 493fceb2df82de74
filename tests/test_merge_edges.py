"""Merging at its edges, preset by preset, and whole models against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltafold import merge
from deltafold.coding.counter import derive_key, random_u32
from deltafold.merging.methods import CONSENSUS, PRESETS, SPARSIFIERS
from deltafold.merging.methods.sparsify import kept_count
from deltafold.merging.recipe import Model, Recipe

State = dict[str, torch.Tensor]
few = settings(deadline=None, max_examples=25)
SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.1.mlp.up_proj.weight": (48, 32),
    "model.layers.1.mlp.up_proj.bias": (48,),
    "model.norm.weight": (1,),
}
SEED = 5


def random_state(seed: int, size: float, base: State | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    found = {n: size * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    return {name: tensor + base[name] if base else tensor for name, tensor in found.items()}


BASE = random_state(0, 1.0)
TUNED = [random_state(seed, 0.1, BASE) for seed in (1, 2, 3)]


def merged(folder: Path, tuned: list[State], method: str, **options: float) -> State:
    """Merge through files; every model has the same options."""
    own = {key: options.pop(key) for key in ("weight", "density") if key in options}
    for name, state in (("base", BASE), *((f"tuned{n}", s) for n, s in enumerate(tuned))):
        save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
    paths = [str(folder / f"tuned{n}.safetensors") for n in range(len(tuned))]
    recipe = Recipe(tuple(Model(path, **own) for path in paths), method, **options)
    merge(recipe, folder / "out", base=folder / "base.safetensors", seed=SEED, workers=1)
    return load_file(folder / "out" / "model.safetensors")


def models_of(method: str, tuned: list[State]) -> list[State]:
    return tuned[:2] if PRESETS[method].consensus == "slerp" else tuned


def close(found: State, wanted: State) -> bool:
    return all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-6) for n in wanted)


@pytest.mark.parametrize("method", PRESETS)
def test_models_equal_to_the_base_give_the_base(method: str, tmp_path: Path) -> None:
    assert close(merged(tmp_path, models_of(method, [BASE] * 3), method), BASE)


@pytest.mark.parametrize("method", PRESETS)
def test_density_zero_gives_the_base(method: str, tmp_path: Path) -> None:
    """Where the method has a density, and ImPart leaves what is no matrix as it is."""
    found = merged(tmp_path, models_of(method, TUNED), method, density=0.0)
    assert all(tensor.isfinite().all() for tensor in found.values())
    sparsifier = PRESETS[method].sparsifier
    if sparsifier != "none":
        names = [n for n in BASE if BASE[n].ndim == 2 or sparsifier != "impart"]
        assert all(torch.equal(found[name], BASE[name]) for name in names)


@pytest.mark.parametrize("method", sorted(set(PRESETS) - {"slerp"}))
def test_one_model_alone(method: str, tmp_path: Path) -> None:
    """With nothing dropped it is that model."""
    whole = merged(tmp_path, TUNED[:1], method, density=1.0)
    assert close(whole, TUNED[0])


@pytest.mark.parametrize("method", PRESETS)
def test_small_tensors_are_finite_and_moved(method: str, tmp_path: Path) -> None:
    """Norms of 32 entries and of one: kept in part even at a small density."""
    found = merged(tmp_path, models_of(method, TUNED), method, density=0.01)
    assert all(tensor.isfinite().all() for tensor in found.values())
    if PRESETS[method].sparsifier in ("none", "magnitude", "breadcrumbs", "impart"):
        moved = (found["model.layers.0.input_layernorm.weight"] != BASE[
            "model.layers.0.input_layernorm.weight"]).sum()  # fmt: skip
        assert 1 <= moved <= 32


@pytest.mark.parametrize("weight", [0.0, -1.0])
@pytest.mark.parametrize("method", PRESETS)
def test_odd_weights_are_finite(method: str, weight: float, tmp_path: Path) -> None:
    found = merged(tmp_path, models_of(method, TUNED), method, weight=weight)
    assert all(tensor.isfinite().all() for tensor in found.values())


def plain_sum(name: str, base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    return base + sum(each - base for each in tuned)


def plain_dare(name: str, base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    """Masks from the counter generator: entry i of model n is kept where u_i < density."""
    out = base.clone()
    for n, each in enumerate(tuned):
        drawn = random_u32(derive_key(SEED, name, f"merge {n}"), 0, base.numel())
        kept = torch.tensor([int(u) / 2**32 < 0.5 for u in drawn]).reshape(base.shape)
        out += torch.where(kept, (each - base) / 0.5, 0.0)
    return out


def plain_ties(name: str, base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    """Entry by entry, in plain numbers."""
    count = max(1, int(0.2 * base.numel()))
    trimmed = []
    for each in tuned:
        delta = (each - base).reshape(-1).tolist()
        order = sorted(range(len(delta)), key=lambda i, d=delta: (-abs(d[i]), i))[:count]
        trimmed.append([d if i in set(order) else 0.0 for i, d in enumerate(delta)])
    out = []
    for entries in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(entries))
        agreeing = [entry for entry in entries if entry * sign > 0]
        out.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return base + torch.tensor(out).reshape(base.shape)


def plain_slerp(name: str, base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    one, two = (each.double() for each in tuned[:2])
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    if abs(cosine) > 0.9995:
        return ((one + two) / 2).float()
    angle = math.acos(cosine)
    return (math.sin(angle / 2) / math.sin(angle) * (one + two)).float()


PLAIN: dict[str, Callable[[str, torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "task-arithmetic": plain_sum, "dare": plain_dare, "ties": plain_ties, "slerp": plain_slerp
}  # fmt: skip


@pytest.mark.parametrize("method", PLAIN)
def test_whole_models_by_plain_formulas(method: str, tmp_path: Path) -> None:
    found = merged(tmp_path, models_of(method, TUNED), method)
    wanted = {n: PLAIN[method](n, BASE[n], [each[n] for each in TUNED]) for n in BASE}
    assert close(found, wanted)


@few
@example("dare", (1,), 1e-126, 0, 0)
@given(
    st.sampled_from(sorted(SPARSIFIERS)),
    st.sampled_from([(1,), (7,), (32,), (5, 9), (24, 20)]),
    st.floats(0, 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1000),
)
def test_sparsifiers(
    name: str, shape: tuple[int, ...], density: float, key: int, seed: int
) -> None:
    """The same for the same key, finite, of the same shape; masks keep between none and all."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    before = delta.clone()
    found = SPARSIFIERS[name](delta, density, key, {})
    assert torch.equal(found, SPARSIFIERS[name](delta, density, key, {}))
    assert torch.equal(delta, before)
    assert found.shape == delta.shape and found.isfinite().all()
    kept = int((found != 0).sum())
    if name in ("magnitude", "breadcrumbs"):
        assert kept == kept_count(density, delta.numel())
        assert torch.equal(found[found != 0], delta[found != 0])
    elif name in ("dare", "della"):
        assert 0 <= kept <= delta.numel()
        assert (found[found != 0] * delta[found != 0] > 0).all()  # signs stay
        assert (found.abs() >= delta.abs() * (found != 0) * (1 - 1e-6)).all()  # and nothing shrinks


@few
@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from(sorted(CONSENSUS)))
def test_consensus_lies_in_the_range_of_what_it_is_given(k: int, seed: int, name: str) -> None:
    """Entry by entry: means between the smallest and the largest, sums between sums of signs."""
    generator = torch.Generator().manual_seed(seed)
    k = 2 if name == "slerp" else k
    deltas = [torch.randn(33, generator=generator) for _ in range(k)]
    found, stack = CONSENSUS[name](deltas, [1.0] * k, {}), torch.stack(deltas)
    assert found.isfinite().all()
    if name in ("mean", "ties"):
        assert (found <= stack.amax(0) + 1e-6).all() and (found >= stack.amin(0) - 1e-6).all()
    else:
        assert (found.abs() <= stack.abs().sum(0) * 1.5).all()


@pytest.mark.parametrize("name", sorted(set(CONSENSUS) - {"slerp"}))
def test_pieces_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafold.merging.methods import consensus, sparsify

    deltas = [torch.randn(7, 11, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    rules = ("magnitude", "breadcrumbs", "della")
    whole = CONSENSUS[name](deltas, [1.0, 0.5, 2.0], {})
    sparse = [SPARSIFIERS[rule](deltas[0], 0.4, 9, {}) for rule in rules]
    monkeypatch.setattr(consensus, "PIECE", 10)
    monkeypatch.setattr(sparsify, "PIECE", 23)
    assert torch.equal(whole, CONSENSUS[name](deltas, [1.0, 0.5, 2.0], {}))
    for rule, wanted in zip(rules, sparse, strict=True):
        assert torch.equal(wanted, SPARSIFIERS[rule](deltas[0], 0.4, 9, {}))


def test_large_tensors_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes and figures as when their deltas are held."""
    from deltafold.merging import tensors as merge_tensors
    from deltafold.running.record import read_record

    found = []
    for name, limit in (("held", 1 << 40), ("again", 0)):
        monkeypatch.setattr(merge_tensors, "LARGE_BYTES", limit)
        (tmp_path / name).mkdir()
        state = merged(tmp_path / name, TUNED, "dare-ties")
        found.append((state, read_record(tmp_path / name / "out")["tensors"]))
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in BASE)
    assert found[0][1] == found[1][1]


def test_a_sum_of_zero_elects_nobody_unless_told() -> None:
    deltas = [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, -3.0])]
    assert CONSENSUS["ties"](deltas, [1.0, 1.0], {}).tolist() == [0, -3]
    assert CONSENSUS["ties"](deltas, [1.0, 1.0], {"sign_of_zero": 1.0}).tolist() == [2, -3]
