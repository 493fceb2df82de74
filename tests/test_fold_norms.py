"""Families whose projections are followed by a norm: what is seen of their norms, and healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folding_models import write_deep, write_text, write_trained

from deltafold import fold
from deltafold.blocks.reading import read_layout
from deltafold.calibration import Sample, StreamedModel, make_batches
from deltafold.checkpoint import open_checkpoint
from deltafold.errors import MismatchError
from deltafold.folding.methods.norms import Norm
from deltafold.folding.watching import At, Norms, find_norms

pytestmark = pytest.mark.integration

ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def norms_of(folder: Path) -> Norms:
    checkpoint = open_checkpoint(folder)
    layout, _ = read_layout(checkpoint)
    model = StreamedModel(checkpoint)
    with model.forward(make_batches([Sample(tuple(range(3, 30)))]), keep=True) as done:
        return find_norms(model, layout, 2, At(done, 2))


def test_llama_reads_two_norms(tmp_path: Path) -> None:
    found = norms_of(write_deep(tmp_path / "model", "llama"))
    before = dict.fromkeys(ATTENTION[:3], Norm("input_layernorm.weight"))
    before |= dict.fromkeys(MLP[:2], Norm("post_attention_layernorm.weight"))
    assert found == Norms(before, {})


def test_gemma_3_has_six_that_store_their_gain_less_one(tmp_path: Path) -> None:
    found = norms_of(write_deep(tmp_path / "model", "gemma3"))
    first, second, third, fourth = (
        Norm(f"{name}_layernorm.weight", None, 1.0)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    )
    assert found.before == dict.fromkeys(ATTENTION[:3], first) | dict.fromkeys(MLP[:2], third)
    heads = {ATTENTION[n]: Norm(f"self_attn.{'qk'[n]}_norm.weight", None, 1.0) for n in (0, 1)}
    assert found.after == {ATTENTION[3]: second, MLP[2]: fourth} | heads


def test_gpt_2_has_norms_with_a_bias(tmp_path: Path) -> None:
    found = norms_of(write_deep(tmp_path / "model", "gpt2"))
    assert found == Norms(
        {"attn.c_attn.weight": Norm("ln_1.weight", "ln_1.bias"),
         "mlp.c_fc.weight": Norm("ln_2.weight", "ln_2.bias")}, {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_trained(tmp_path_factory.mktemp("gemma"), "gemma3_text")


def folded(gemma: tuple[Path, Path], out: Path, **options: Any) -> dict[str, Any]:
    model, text = gemma
    return fold(model, out, blocks=2, protect=[0, -1], calibration=text, text=text, **options)


def test_a_trained_gemma_is_healed_through_its_norms(
    gemma: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plain = folded(gemma, tmp_path / "plain", closed_form="none")["quality"]["folded"]["kl"]
    record = folded(gemma, tmp_path / "out")
    assert record["settings"]["closed_form"] == "through"
    kept = [row for row in record["patches"] if row["kept"]]
    assert kept and all(row["norm"] for row in kept)
    assert all(row["error_after"] < row["error_before"] for row in kept)
    assert {row["part"] for row in kept} == {"attention", "mlp"}
    assert record["quality"]["folded"]["kl"] < 0.5 * plain
    assert "unhealed_because" not in record
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_states_at_the_cut_are_what_the_row_says(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder, run again, is as near to the model after the healed block as the record has it."""
    from deltafold.calibration import gather_samples
    from deltafold.calibration.probe import is_held

    model, text = gemma
    record = folded(gemma, tmp_path / "out", closed_form="cut")
    row = record["patches"][0]
    number = row["block"]
    after = next(each for each in record["kept"] if each > number)
    samples = gather_samples(model, text)
    batches = make_batches(samples)
    total, count = 0.0, 0
    with (
        StreamedModel(model).forward(batches, keep=True) as whole,
        StreamedModel(tmp_path / "out").forward(batches, blocks=range(number + 1)) as made,
    ):
        for place, batch in enumerate(batches):
            for each, length, sample in zip(whole.stores[after][place], batch.lengths,
                                            batch.numbers, strict=True):  # fmt: skip
                if not is_held(sample, len(samples)):
                    continue
                line = batch.numbers.index(sample)
                gap = made.last[place][line, :length] - each[:length]
                total += float((gap.square().sum(1) / each[:length].square().sum(1)).sum())
                count += length
    assert total / count == pytest.approx(row["error_after"], rel=0.02)


def test_a_matrix_after_the_mlp_is_refused_where_a_norm_follows(
    gemma: tuple[Path, Path], tmp_path: Path
) -> None:
    for method in ("replaceme", "replaceme-cosine"):
        with pytest.raises(MismatchError, match="a norm follows the down projection"):
            folded(gemma, tmp_path / "out", method=method)
        assert list(tmp_path.iterdir()) == []


def test_it_is_said_that_nothing_was_healed(tmp_path: Path, deltafold: Any) -> None:
    """The first block goes: none stands before the cut that could take over what it did."""
    model, text = write_deep(tmp_path / "model", "llama"), write_text(tmp_path / "text.txt")
    done = deltafold(
        "fold", model, "-o", tmp_path / "out", "-m", "reverse", "-n", "1", "--protect", "1,2,3,4",
        "--closed-form", "through", "--calibration", text, "--max-tokens", "40",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing was healed: no block stands before a cut; --steps 30" in done.stdout


def test_units_of_two_blocks_of_gemma_stand_under_one_norm(
    gemma: tuple[Path, Path], tmp_path: Path
) -> None:
    record = folded(gemma, tmp_path / "out", method="come")
    assert all(0 < step["ratio"] < 1 for step in record["steps"])
    assert torch.isfinite(torch.tensor(record["quality"]["folded"]["kl"]))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_states_are_scaled_at_the_cut(kind: str, tmp_path: Path) -> None:
    """The folder says what the model says whose states are multiplied there, by a hook."""
    from transformers import AutoModelForCausalLM

    model, text = write_deep(tmp_path / "model", kind), write_text(tmp_path / "text.txt")
    record = fold(model, tmp_path / "out", "linearpatch-scale", blocks=2, protect=[0, -1],
                  calibration=text, max_tokens=40)  # fmt: skip
    (row,) = record["patches"]
    assert row["kept"] and row["scale"] != pytest.approx(1, abs=1e-3)
    whole, short = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("model", "out")
    )
    blocks = next(m for m in whole.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    scale: Any = 1.0

    def scaled(module: Any, given: Any, made: Any) -> Any:
        return (made[0] * scale, *made[1:]) if isinstance(made, tuple) else made * scale

    def aside(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if kind == "gpt2" and as_tuple else hidden

    found: list[Any] = []
    hook = blocks[row["block"]].register_forward_hook(lambda *each: found.append(each[2]))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        whole(ids, use_cache=False)
        hook.remove()
        as_tuple = isinstance(found[0], tuple)
        for number in record["removed"]["blocks"]:
            blocks[number].forward = aside
        blocks[row["block"]].register_forward_hook(scaled)
        got = short(ids, use_cache=False).logits
        plain = whole(ids, use_cache=False).logits
        scale = row["scale"]
        wanted = whole(ids, use_cache=False).logits
    # Weights are rounded to bf16 once more.
    assert float((got - wanted).norm()) < 0.02 * float(wanted.norm())
    assert float((got - wanted).norm()) < 0.5 * float((plain - wanted).norm())


def test_states_that_are_read_without_a_norm_cannot_be_scaled(tmp_path: Path) -> None:
    """OLMo 2 has norms after its projections alone."""
    model, text = write_trained(tmp_path, "olmo2", steps=2)
    with pytest.raises(MismatchError, match="do not read hidden states through norms alone"):
        fold(model, tmp_path / "out", "linearpatch-scale", blocks=2, protect=[0, -1],
             calibration=text)  # fmt: skip
    assert not (tmp_path / "out").exists()
