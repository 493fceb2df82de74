"""Training of what an archive stores: gradients by formula, bytes, resuming, and what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tree_hashes
from evaluation_models import VOCABULARY, make_llama, make_tokenizer, nudged, save, write_rows
from test_codecs import decoded as decode
from test_codecs import delta

from deltafold import compress, restore
from deltafold.calibration import Judge, Sample, StreamedModel, backward, make_batches
from deltafold.calibration.whole import backward_whole
from deltafold.checkpoint import open_checkpoint
from deltafold.codecs import delta_codec, names
from deltafold.coding import correction
from deltafold.compressing.distill import can_train
from deltafold.errors import UsageError
from deltafold.linalg.matrices import DenseMatrix
from deltafold.training.stored_numbers import State, _kl_loss, split_samples

KEY, SHAPE = 12345, (48, 40)
TRAINED = ["auto", "bitdelta", "delta-come", "lowrank", "svd-quant"]
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {"step": 2.0, "n_bytes": 0, "rank": 2},
    "bitdelta": {"kept": 1000, "threshold": f"{0:09x}"},
}


def made(name: str, **changed: Any) -> tuple[Any, dict[str, Any], Any, Any, torch.Tensor]:
    """(codec, settings, parts, trainable side, decoded delta) of one small matrix."""
    codec, matrix = delta_codec(name), delta(*SHAPE)
    settings = SETTINGS.get(name) or codec.settings_for(SHAPE, 0.3)
    settings, parts = codec.encode(DenseMatrix(matrix), settings | changed, KEY)
    side = codec.trainable(parts, settings, SHAPE, KEY)
    return codec, settings, parts, side, decode(codec, parts, settings, SHAPE, KEY)


def test_who_can_be_trained() -> None:
    assert [name for name in names() if can_train(name)] == TRAINED


@pytest.mark.parametrize("name", TRAINED)
def test_the_start_is_what_is_stored(name: str) -> None:
    codec, settings, parts, side, whole = made(name)
    assert torch.allclose(side.delta(side.values), whole, rtol=1e-5, atol=1e-8)
    again = side.store(side.values)
    layout = codec.layout(SHAPE, settings)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in again.items()} == {
        k: (spec.dtype, spec.shape) for k, spec in layout.items()
    }
    assert set(side.rates) == set(side.values)
    if name != "auto":  # there the scales of the empty correction stand for something else
        assert all(torch.equal(again[k], parts[k]) for k in parts)
    assert torch.equal(decode(codec, again, settings, SHAPE, KEY), whole)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_is_what_is_stored(name: str) -> None:
    codec, settings, _, side, whole = made(name)
    generator = torch.Generator().manual_seed(3)
    moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in side.values.items()}
    stored = decode(codec, side.store(moved), settings, SHAPE, KEY)
    assert torch.allclose(side.delta(moved), stored, rtol=1e-4, atol=1e-7)
    assert (stored - whole).norm() > 0.01 * whole.norm()


def test_gradient_of_a_bitdelta_scale() -> None:
    _, _, parts, side, whole = made("bitdelta")
    gradient = torch.randn(48, 40, generator=torch.Generator().manual_seed(4))
    leaf = side.values["scale"].clone().requires_grad_()
    side.delta({"scale": leaf}).backward(gradient)
    signs = whole.sign()
    by_formula = parts["scale"] * 48 * 40 / 1000 * (gradient * signs).sum()
    assert int(signs.abs().sum()) == 1000
    assert torch.allclose(leaf.grad, by_formula, rtol=1e-4)


def test_gradients_of_a_correction_and_of_the_unit() -> None:
    _, _, _, side, whole = made("auto")
    gradient = 100 * delta(*SHAPE, seed=4)
    begun = side.start(gradient)
    leaves = {k: v.clone().requires_grad_() for k, v in begun.items()}
    side.delta(leaves).backward(gradient)
    size = side.size  # (r, 1)
    right = correction.through(begun["right"])
    assert torch.allclose(leaves["left"].grad, size * (right @ gradient.T), rtol=1e-4, atol=1e-6)
    assert leaves["right"].grad.abs().max() == 0  # L is still zero
    by_formula = (gradient * whole).sum()  # sum(G D^), as D^ is in proportion to the unit
    assert torch.allclose(leaves["unit"].grad, by_formula[None], rtol=1e-4, atol=1e-7)
    # R starts where the gradient is largest: along its leading right singular vectors.
    vectors = torch.linalg.svd(gradient)[2][:2]
    cosines = (torch.nn.functional.normalize(begun["right"]) @ vectors.T).abs()
    assert torch.allclose(cosines, torch.eye(2), atol=1e-3)


def test_the_part_of_a_correction() -> None:
    left, right = torch.randn(3, 5), torch.randn(3, 7)
    (a, l8), (b, r8) = correction.rounded(left), correction.rounded(right)
    fix = correction.Correction(a, b, l8, r8)
    part = fix.to_part()
    assert len(part) == correction.fix_bytes((5, 7), 3) == 3 * (5 + 7 + 8)
    again = correction.read(part, (5, 7), 3)
    assert torch.equal(again.rows(1, 4), fix.rows(1, 4))
    assert torch.allclose(fix.rows(0, 5), left.T @ right, atol=0.1)
    assert (left - l8 * a).abs().max() <= a.max() / 2 * 1.001
    broken = part.clone()
    broken[:4] = 255
    with pytest.raises(ValueError, match="damaged"):
        correction.read(broken, (5, 7), 3)


def test_auto_without_a_correction_is_as_before() -> None:
    _, _, parts, _, whole = made("auto", rank=0)
    _, _, with_fix, _, same = made("auto")
    assert set(parts) == {"code"} and set(with_fix) == {"code", "fix"}
    assert torch.equal(parts["code"], with_fix["code"]) and torch.equal(whole, same)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, fine-tune, calibration text)."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}."} for a in range(12, 18) for b in range(8)]
    return (
        save(make_llama(0), folder / "base", tokenizer),
        save(nudged(make_llama(0), 1, 0.1), folder / "tuned", tokenizer),
        write_rows(folder / "rows.jsonl", rows),
    )


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def random_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    return [
        Sample(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()), start)
        for n, start in ((20, 1), (19, 15), (33, 30), (8, 4), (8, 2))
    ]


def test_both_ways_to_the_gradients(folders: tuple[Path, Path, Path]) -> None:
    samples, base = random_samples(), open_checkpoint(folders[0])
    chosen = [3, 0, 4]
    found = []
    for run in (backward, backward_whole):
        model = StreamedModel(folders[1])
        with Judge(model, None, samples) as judge:
            batches = make_batches([samples[n] for n in chosen])
            first = [0]
            for batch in judge.batches:
                for n in batch.numbers:
                    first.append(first[-1] + samples[n].counted)
            order = [n for batch in judge.batches for n in batch.numbers]
            at = {n: torch.arange(first[k], first[k + 1]) for k, n in enumerate(order)}
            rows = [at[chosen[place]] for batch in batches for place in batch.numbers]
            gradients: dict[str, torch.Tensor] = {}
            loss = run(
                model.with_weights(base.tensor),
                batches,
                _kl_loss(judge, torch.cat(rows)),
                gradients.__setitem__,
                lambda name: "norm" not in name,
            )
        found.append((loss, gradients))
        # The same loss, by the formula of `Judge` on those samples alone.
        with Judge(StreamedModel(folders[1]), None, [samples[n] for n in chosen]) as alone:
            assert loss == pytest.approx(alone.kl(base.tensor) * alone.tokens, rel=1e-4)
    (one, streamed), (two, whole) = found
    assert one == pytest.approx(two) and one > 0
    assert set(streamed) == set(whole) and "model.embed_tokens.weight" in whole
    for name, gradient in streamed.items():
        assert torch.allclose(gradient, whole[name], rtol=1e-4, atol=1e-6), name
    assert all("norm" not in name for name in whole)


def run(folders: tuple[Path, Path, Path], out: Path, method: str = "auto", **more: Any) -> Any:
    base, tuned, text = folders
    options = {"file_ratio": 4.5, "calibration": text, "steps": 24, "samples": 48} | more
    return compress(base, tuned, out, method, **options)


@pytest.mark.parametrize("method", ["auto", "bitdelta", "lowrank"])
def test_kl_goes_down(folders: tuple[Path, Path, Path], tmp_path: Path, method: str) -> None:
    # Of lowrank few numbers are left to train at 4.5; of bitdelta hardly an error is left there.
    asked = {"lowrank": 4.3, "bitdelta": 5.0}.get(method, 4.5)
    more = {} if method == "auto" else {"fallback": False}
    record = run(folders, tmp_path / "a.delta", method, file_ratio=asked, **more)
    found = record["distill"]
    assert found["kept"] == "trained" and found["kl_after"] < 0.95 * found["kl_before"]
    assert (found["steps"], found["samples"], found["held_out"]) == (24, 48, 6)
    assert record["totals"]["file_ratio"] >= asked * 0.99
    restore(tmp_path / "a.delta", folders[0], tmp_path / "restored")
    # The restored model is the one that was trained: same KL on the held-out samples.
    from deltafold.calibration.samples import read_samples
    from deltafold.calibration.tokens import Encoder

    rows = read_samples(folders[2], Encoder(make_tokenizer(), 128), 48, 0)
    restored = open_checkpoint(tmp_path / "restored")
    with Judge(folders[1], None, split_samples(rows, 0)[1]) as judge:
        assert judge.kl(restored.tensor) == pytest.approx(found["kl_after"], rel=1e-3)


def test_a_correction_takes_its_bytes_from_the_budget(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltafold.compressing import search

    monkeypatch.setattr(search, "CORRECTION_SHARE", 0.5)
    record = run(folders, tmp_path / "a.delta", file_ratio=3.0, steps=11)
    assert record["distill"]["values"] > 1000  # corrections, not units alone
    assert 3.0 <= record["totals"]["file_ratio"] < 3.1
    again = run(folders, tmp_path / "b.delta", file_ratio=3.0, steps=11)
    assert tree_hashes(tmp_path / "a.delta") == tree_hashes(tmp_path / "b.delta")
    assert again["distill"]["kl_after"] == record["distill"]["kl_after"]


@pytest.fixture(scope="module")
def whole(
    folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The archive of a run that nothing broke off, and its record."""
    out = tmp_path_factory.mktemp("whole") / "b.delta"
    return out, run(folders, out)


@pytest.mark.parametrize("stop", [5, 10, 17, 24])
def test_a_broken_run_ends_with_the_same_bytes(
    folders: tuple[Path, Path, Path], whole: tuple[Path, dict[str, Any]], tmp_path: Path, stop: int
) -> None:
    def until(step: Any) -> None:
        if step.stage == "distill" and step.done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "a.delta", progress=until)
    seen = []
    broken = run(folders, tmp_path / "a.delta", progress=lambda s: seen.append((s.stage, s.done)))
    steps = [done for stage, done in seen if stage == "distill"]
    assert steps[:1] == ([stop // 10 * 10 + 1] if stop < 24 else [])
    assert tree_hashes(tmp_path / "a.delta") == tree_hashes(whole[0])
    assert broken["distill"]["kl_after"] == whole[1]["distill"]["kl_after"]


def test_a_state_comes_back() -> None:
    value = {"a/b": torch.randn(3)}
    state = State(7, value, value, value, value, 0.1, 0.2)
    again = State.from_tensors(state.to_tensors())
    assert (again.step, again.best_kl, again.start_kl) == (7, 0.1, 0.2)
    assert torch.equal(again.best["a/b"], value["a/b"])


def test_what_cannot_be_trained_is_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.delta"
    with pytest.raises(UsageError, match=r"dare stores nothing .* auto, bitdelta, delta-come"):
        run(folders, out, "dare")
    with pytest.raises(UsageError, match="number of steps"):
        run(folders, out, steps=-1)
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": "1+1=", "answer": "2."}] * 3)
    with pytest.raises(UsageError, match="at least 8 samples"):
        run(folders, out, calibration=few)
    assert not out.exists()


@pytest.mark.parametrize("method", TRAINED)
def test_where_nothing_can_be_trained_nothing_is(
    folders: tuple[Path, Path, Path], tmp_path: Path, method: str
) -> None:
    """A fine-tune that differs from its base in norms alone: all that is stored is exact."""
    base, _, text = folders
    tuned = make_llama(0)
    for module in tuned.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.constant_(module.weight, 1.1)
    save(tuned, tmp_path / "norms", make_tokenizer())
    size = {"file_ratio": None, "nominal_ratio": 4.0} if method != "auto" else {"file_ratio": 2}
    record = run((base, tmp_path / "norms", text), tmp_path / "a.delta", method, **size)
    found = record["distill"]
    assert (found["values"], found["kept"]) == (0, "start")
    assert found["kl_before"] == found["kl_after"] == pytest.approx(0, abs=1e-6)
    restore(tmp_path / "a.delta", base, tmp_path / "restored")
    one, two = open_checkpoint(tmp_path / "norms"), open_checkpoint(tmp_path / "restored")
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.tensors)


@pytest.mark.parametrize("method", ["delta-come", "lowrank", "svd-quant"])
def test_where_no_rank_is_left_nothing_is_trained(
    folders: tuple[Path, Path, Path], tmp_path: Path, method: str
) -> None:
    none: dict[str, Any] = {"file_ratio": None, "nominal_ratio": 1e6}
    found = run(folders, tmp_path / "a.delta", method, **none)["distill"]
    assert (found["values"], found["kept"]) == (0, "start") and found["kl_after"] > 0


@pytest.mark.parametrize("run", [backward, backward_whole])
def test_nothing_wanted_gives_the_loss_alone(folders: tuple[Path, Path, Path], run: Any) -> None:
    found: dict[str, torch.Tensor] = {}
    batches = make_batches(random_samples())

    def loss(start: int, logits: torch.Tensor) -> torch.Tensor:
        return logits.square().sum()

    assert run(StreamedModel(folders[1]), batches, loss, found.__setitem__, lambda _: False) > 0
    assert found == {}
