"""Invariants of shared models under training, over all families; the loop; the schedule by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folding_models import write_deep
from sharing_models import IDS
from tiny_models import FAMILIES

from deltafold.calibration.building import find_blocks
from deltafold.checkpoint import open_checkpoint
from deltafold.composed.form import Linear, Part
from deltafold.composed.write import Source
from deltafold.errors import NonFiniteError, UsageError
from deltafold.linalg.whitening import output_error
from deltafold.running.workspace import Workspace
from deltafold.sharing.fit import fit
from deltafold.sharing.job import structure_of
from deltafold.sharing.methods.initialise import INITIALISATIONS, least_scale
from deltafold.sharing.methods.plan import make_plan
from deltafold.sharing.methods.replacing import Schedule, SharedStudent
from deltafold.sharing.request import STARTS, ShareRequest
from deltafold.sharing.start import Start, composed_values
from deltafold.sharing.train import ShareModel
from deltafold.training import Masters, Rows, Settings, State, Watch, pack, train
from deltafold.training.distilled import distilled
from deltafold.training.loop import batch_rows, losses

MOE = ("mixtral", "qwen2 moe")
CPU = torch.device("cpu")


def make_student(
    folder: Path, family: str, start: str = "svd", align: bool = False, **request: Any
) -> tuple[ShareModel, SharedStudent, Any]:
    write_deep(folder / "base", family)
    matrices = "attention" if family in MOE else "mlp"
    asked = {"shared": 1, "rank": 4, "protect": (0, 1, -1), "matrices": matrices} | request
    plan = make_plan(structure_of(folder / "base"), ShareRequest("base", "output", **asked))
    with open_checkpoint(folder / "base") as checkpoint, Workspace(folder / "out", {}) as scratch:
        begin = Start(Source.of(checkpoint), plan, start, align and family not in MOE)
        factors = begin.factors(scratch)
        model = ShareModel.load(folder / "base", False, CPU)
        student = model.student(plan, factors, begin.changed, Schedule(), 100, 0)
    return model, student, plan


@pytest.mark.integration
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_invariants(tmp_path: Path, family: str, scale: bool) -> None:
    model, student, plan = make_student(tmp_path, family, rank=64, row_scale=scale)
    whole = ShareModel.load(tmp_path / "base", False, CPU).model
    expected = whole(IDS).logits
    # full rank and svd: the base model
    student.begin_exam()
    assert torch.allclose(student.logits(IDS), expected, atol=2e-4 * float(expected.abs().max()))
    # nothing replaced: the teacher bit for bit
    assert torch.equal(student.teacher(IDS), expected)
    for swap in student.swaps:
        swap.use(False)
    assert torch.equal(student.logits(IDS), expected)
    # only A and B are trained, and they get gradients
    student.begin_exam()
    student.logits(IDS).square().mean().backward()
    trained = {name for name, p in model.model.named_parameters() if p.grad is not None}
    assert trained == set(plan.form().factors()) == set(student.parameters)
    # frozen tensors are in memory once
    held = sum(p.numel() for p in model.model.parameters())
    assert held == plan.parameters
    # and the old layers come back
    model.close()
    assert torch.equal(model.model(IDS).logits, expected)


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_delta_is_the_anchors_module(tmp_path: Path, family: str) -> None:
    model, _, plan = make_student(tmp_path, family, start="zero")
    place = plan.places[0]
    generator = torch.Generator().manual_seed(3)
    for layer in plan.structure.of(place.block, plan.parts):
        here = model.model.get_submodule(plan.structure.path(place.block, layer.local))
        there = model.model.get_submodule(plan.structure.path(place.anchor, layer.local))
        x = torch.randn(2, 5, layer.shape[1], generator=generator)
        bias = 0.0 if here.bias is None else here.bias - there.bias
        assert torch.allclose(here(x), there(x) + bias, atol=1e-5)
        if here.bias is None:
            assert torch.equal(here(x), there(x))


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_aligned_neurons_at_full_rank_are_the_base_model_too(tmp_path: Path, family: str) -> None:
    _, student, _ = make_student(tmp_path, family, rank=64, align=True)
    expected = ShareModel.load(tmp_path / "base", False, CPU).model(IDS).logits
    student.begin_exam()
    found = student.logits(IDS)
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.integration
def test_alignment_brings_the_matrices_nearer(tmp_path: Path) -> None:
    """Block 3's neurons are block 2's in another order: aligned, their difference is nothing."""
    from folding_models import build_deep

    built = build_deep("llama")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    anchor, delta = built.model.layers[2].mlp, built.model.layers[3].mlp
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(anchor, name).weight.data
        getattr(delta, name).weight.data = weight.index_select(axis, order).clone()
    built.save_pretrained(tmp_path / "base")
    request = ShareRequest("base", "output", shared=1, rank=2, protect=(0, 1, -1))
    plan = make_plan(structure_of(tmp_path / "base"), request)
    sizes = {}
    with (
        open_checkpoint(tmp_path / "base") as checkpoint,
        Workspace(tmp_path / "out", {}) as scratch,
    ):
        for align in (False, True):
            made = Start(Source.of(checkpoint), plan, "svd", align).factors(scratch)
            sizes[align] = sum(float(value.abs().sum()) for value in made.values())
    assert sizes[True] < 1e-3 * sizes[False]


def test_initialisations_by_hand() -> None:
    assert {*INITIALISATIONS, "fit"} == set(STARTS)
    difference = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    a, b = INITIALISATIONS["svd"](difference, 1, None, "x", 0)
    assert torch.allclose(b @ a, torch.tensor([[3.0, 0.0], [0.0, 0.0]]), atol=1e-6)
    assert float(a.norm()) == pytest.approx(float(b.norm())) == pytest.approx(math.sqrt(3))
    # The second input is ten times as large: its column costs more to leave out.
    second = torch.diag(torch.tensor([1.0, 100.0]))
    a, b = INITIALISATIONS["activation"](difference, 1, second, "x", 0)
    assert torch.allclose(b @ a, torch.tensor([[0.0, 0.0], [0.0, 2.0]]), atol=1e-5)
    a, b = INITIALISATIONS["zero"](difference, 1, None, "x", 0)
    assert not b.any()
    assert a.any()
    same, _ = INITIALISATIONS["zero"](difference, 1, None, "x", 0)
    assert torch.equal(a, same)


def test_the_scale_of_a_row_is_its_least_squares() -> None:
    anchor = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    weight = torch.tensor([[3.0, 1.0], [-1.0, 5.0]])
    assert least_scale(weight, anchor, None).tolist() == pytest.approx([2.0, -0.5])
    # The second input is all that there is: each row is scaled to it.
    second = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert least_scale(weight, anchor, second).tolist() == pytest.approx([1.0, 0.0])
    assert least_scale(weight, anchor, second.diagonal()).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["deltallm", "no-anchor"])
def test_a_fitted_start_writes_nearer_to_the_original(
    tmp_path: Path, family: str, method: str
) -> None:
    """Of the first block that shares: what its last matrix puts out, against the original's."""
    model, student, plan = make_student(
        tmp_path, family, method=method, rank=6, row_scale=method == "deltallm"
    )
    blocks, _ = find_blocks(model.model, tmp_path / "base")
    number, parts = plan.places[0].block, plan.parts
    local = [layer for layer in plan.structure.of(number, parts) if layer.writes][-1].local
    writer, made = blocks[number].get_submodule(local), []
    handle = writer.register_forward_hook(lambda layer, args, out: made.append(out.detach()))

    def error() -> float:
        made.clear()
        student.teacher(ids)
        student.begin_exam()
        student.logits(ids)
        return float((made[0] - made[1]).square().sum())

    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 60, (16, 24), generator=generator)
    before, frozen = error(), student.teacher(ids)
    found = fit(student, blocks, plan, Rows(ids, torch.ones_like(ids).bool()), CPU, 0)
    assert set(found) <= set(student.parameters)
    assert found
    assert error() < 0.9 * before
    assert torch.equal(student.teacher(ids), frozen)
    handle.remove()


def test_masters_move_by_less_than_bf16_resolves() -> None:
    layer = torch.nn.Linear(3, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    masters = Masters([("weight", layer.weight)])
    optimizer = torch.optim.SGD(masters.parameters.values(), lr=1.0)
    for _ in range(8):  # each step moves by 1/1024; bf16 near 1 has steps of 1/128
        for _ in range(2):  # gradients of two pieces add up
            layer(torch.full((1, 3), -1 / 2048, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masters.round()
    assert masters.parameters["weight"].tolist() == [[1 + 8 / 1024] * 3]
    assert layer.weight.tolist() == [[1 + 8 / 1024] * 3]


def test_schedule_by_hand() -> None:
    schedule = Schedule(0.3, 0.5, 0.5)  # T = 100, n = 3: ramps of 25 steps, starts at 0, 12.5, 25
    for step, place, expected in (
        (0, 0, 0.3), (10, 0, 0.58), (25, 0, 1.0), (12, 1, 0.0), (13, 1, 0.3 + 0.7 * 0.5 / 25),
        (24, 2, 0.0), (25, 2, 0.3), (50, 2, 1.0), (99, 2, 1.0),
    ):  # fmt: skip
        assert schedule.probability(step, place, 3, 100) == pytest.approx(expected)
    linear = Schedule(0.3, 0.5, 0.0)
    assert [linear.probability(25, place, 3, 100) for place in range(3)] == pytest.approx(
        [0.65] * 3
    )
    assert Schedule(0.3, 0.0, 0.5).probability(0, 2, 3, 100) == 1.0
    with pytest.raises(UsageError, match="stagger lies between 0 and 0"):
        ShareRequest("model", "output", shared=1, rank=1, replace_stagger=1.0)


@pytest.mark.integration
def test_draws_follow_their_probabilities_and_are_the_same_again(tmp_path: Path) -> None:
    _, student, _ = make_student(tmp_path, "llama")
    student.steps = 2000
    drawn = []
    for step in range(400):
        student.begin_step(step)
        drawn.append(student._used[0])
    expected = sum(student.schedule.probability(t, 0, 1, 2000) for t in range(400))
    assert abs(sum(drawn) - expected) < 4 * math.sqrt(400) / 2
    student.begin_step(7)
    assert student._used[0] == drawn[7]


class Toy:
    """Logits that are a table, of which every entry is trained."""

    def __init__(self, vocabulary: int = 5):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.parameters = {"table": self.table}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]

    def begin_step(self, step: int) -> None: ...

    def begin_exam(self) -> None: ...


def toy_rows(count: int = 24) -> Rows:
    ids = (torch.arange(count * 8) * 7 % 11 % 5).view(count, 8)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return Rows(ids, counted)


def teacher(ids: torch.Tensor) -> torch.Tensor:
    return 2.0 * torch.nn.functional.one_hot((ids + 1) % 5, 5).float()


def test_the_loss_by_hand() -> None:
    student = Toy(2)
    student.table.data = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    ids, counted = torch.tensor([[0, 1, 1]]), torch.tensor([[False, True, True]])
    p = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    with torch.no_grad():
        _, ce, kl = losses(
            student.logits, lambda n: p[n], ids, counted, Settings(1, temperature=1.0)
        )
    # after 0: q = (1/2, 1/2), p = (1/4, 3/4); after 1: q = p = (1/4, 3/4); the next is 1 twice
    assert float(ce) == pytest.approx(math.log(2) - math.log(0.75), rel=1e-5)
    assert float(kl) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_made_on_the_way_is_that_of_autograd(share: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9, generator=generator, requires_grad=True)
    other = torch.randn(6, 9, generator=generator)
    places, next_ids = torch.tensor([5, 0, 1, 3]), torch.tensor([0, 8, 3, 3])
    found, ce, kl = distilled(logits, other, places, next_ids, share, temperature)
    found.backward()
    (got,), logits.grad = [logits.grad], None
    functional = torch.nn.functional
    q, p = logits[places], other[places]
    want_ce = functional.cross_entropy(q, next_ids, reduction="sum")
    want_kl = functional.kl_div(
        (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    want = (1 - share) * want_ce + share * temperature**2 * want_kl
    want.backward()
    assert got is not None
    torch.testing.assert_close(got, logits.grad)
    assert [found.item(), ce.item(), kl.item()] == pytest.approx(
        [want.item(), want_ce.item(), want_kl.item()], rel=1e-5
    )


def test_pieces_of_a_large_vocabulary_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, other = (torch.randn(7, 11, generator=generator) for _ in range(2))
    arguments = (other, torch.arange(7), torch.arange(7), 0.5, 2.0)
    whole = distilled(logits.requires_grad_(), *arguments)
    monkeypatch.setattr("deltafold.training.distilled.PIECE_NUMBERS", 25)  # two tokens each
    pieces = distilled(logits, *arguments)
    assert [x.item() for x in pieces] == pytest.approx([x.item() for x in whole], rel=1e-6)


def test_the_loop_learns_and_goes_on_where_it_was() -> None:
    learn, held = toy_rows().split(0)
    settings = Settings(40, rate=0.05, batch_rows=4, check_steps=10, kl_share=1.0)
    whole = Toy()
    done = train(whole, teacher, learn, held, settings)
    assert done.exams[-1][2] < 0.3 * done.exams[0][2]
    assert len(done.curve) == 40

    class KilledError(Exception): ...

    kept: list[dict[str, torch.Tensor]] = []

    def save(state: State) -> None:
        kept.append({k: v.clone() for k, v in state.to_tensors().items()})
        if state.step == 20:
            raise KilledError

    with pytest.raises(KilledError):
        train(Toy(), teacher, learn, held, settings, watch=Watch(save=save))
    again = Toy()
    resumed = train(
        again, teacher, learn, held, settings, watch=Watch(State.from_tensors(kept[-1]))
    )
    assert torch.equal(again.table, whole.table)
    assert resumed.curve == done.curve
    assert resumed.exams == done.exams


def test_it_stops_when_held_out_text_does_not_gain() -> None:
    learn, held = toy_rows().split(0)
    settings = Settings(400, rate=0.5, batch_rows=4, check_steps=5, patience=2, kl_share=0.0)
    state = train(Toy(), teacher, learn, held, settings)  # CE pulls away from the teacher
    assert state.step < 400
    assert state.best_step + 2 * 5 == state.step or state.best_step == 0


def near_the_teacher() -> Toy:
    student = Toy()
    student.table.data = teacher(torch.arange(5)) + 0.02 * student.table.data
    return student


def test_a_rate_that_makes_it_worse_is_lowered() -> None:
    """Steps of 0.2 for a table that is wrong by 0.02; once it gains, no step is taken back."""
    learn, held = toy_rows().split(0)
    settings = Settings(60, rate=0.2, batch_rows=4, check_steps=5, kl_share=1.0, temperature=1.0)
    state = train(near_the_teacher(), teacher, learn, held, settings)
    assert state.exams[1][2] > state.exams[0][2]
    assert state.scale in (1 / 3, 1 / 9, 1 / 27)
    assert state.best_step > 0 and state.best_kl < 0.5 * state.exams[0][2]
    waiting = replace(settings, earliest_stop=60)  # nothing can be said before all is replaced
    left = train(near_the_teacher(), teacher, learn, held, waiting)
    assert left.exams[1] == state.exams[1] and left.exams[2] != state.exams[2]


def test_a_lowered_rate_goes_on_after_an_interruption() -> None:
    learn, held = toy_rows().split(0)
    settings = Settings(30, rate=0.2, batch_rows=4, check_steps=5, kl_share=1.0, temperature=1.0)
    whole, again, kept = near_the_teacher(), near_the_teacher(), []

    def save(state: State) -> None:
        kept.append({k: v.clone() for k, v in state.to_tensors().items()})

    done = train(whole, teacher, learn, held, settings, watch=Watch(save=save))
    resumed = train(again, teacher, learn, held, settings, watch=Watch(State.from_tensors(kept[0])))
    assert done.scale < 1 and resumed.exams == done.exams
    assert torch.equal(again.table, whole.table)


def test_a_loss_that_is_not_finite_is_told() -> None:
    learn, held = toy_rows().split(0)
    student = Toy()

    def broken(ids: torch.Tensor) -> torch.Tensor:
        return teacher(ids) * torch.nan

    with pytest.raises(NonFiniteError, match="lower the rate"):
        train(student, broken, learn, held, replace(Settings(3), kl_share=1.0))


def test_rows_come_once_each_before_any_comes_again() -> None:
    settings = Settings(9, batch_rows=3, seed=4)
    seen = [n for step in range(4) for n in batch_rows(6, settings, step)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_packing() -> None:
    from deltafold.calibration import Sample

    rows = pack([Sample((1, 2, 3, 4), 2), Sample((5, 6, 7)), Sample((8, 9))], 4)
    assert rows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert rows.counted.tolist() == [[False, False, True, True], [False, True, True, False]]
    with pytest.raises(UsageError, match="two are needed"):
        pack([Sample((1, 2))], 4).split(0)


def test_scaled_anchors_are_never_farther_than_factors_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    anchor, other, x = (torch.randn(n, 12, generator=generator) for n in (8, 8, 40))
    second = x.T @ x / 40
    for likeness in (0.0, 0.5):
        weight = likeness * anchor + other
        errors = []
        for scale in (False, True):
            entry = Linear(shape=(8, 12), scale=scale, parts=(Part(rows=8, rank=3),))
            base = anchor if scale else torch.zeros_like(anchor)
            found = composed_values("x", entry, weight, base, second, "activation", 0)
            made = found["x.delta.0.b"] @ found["x.delta.0.a"]
            if scale:
                made += found["x.scale"][:, None] * anchor
            errors.append(output_error(weight, made, second)[0])
        assert errors[1] < errors[0]
