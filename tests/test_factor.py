"""`factor` end to end on tiny models: counts, files, both ways to load, bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folding_models import write_deep, write_text
from refusals import nothing_left, refused
from safetensors import safe_open
from tiny_models import FAMILIES

import deltafold
from deltafold.calibration.samples import SampleError
from deltafold.checkpoint import open_checkpoint
from deltafold.composed.modeling import ComposedLinear
from deltafold.errors import BudgetError, CheckpointError, MismatchError, UsageError
from deltafold.factoring.factor import factor
from deltafold.factoring.request import FactorRequest
from deltafold.factoring.store import Candidate, FactorStore

pytestmark = pytest.mark.integration
IDS = torch.arange(3, 27)[None]
DENSE_FAMILIES = [name for name in FAMILIES if name not in ("mixtral", "qwen2 moe")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return write_deep(folder / "model", "llama"), write_text(folder / "text.txt")


def settings(words: Path, **more: Any) -> dict[str, Any]:
    return {"calibration": words, "max_tokens": 40, **more}


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return found


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def generated(model: Any, cached: bool) -> list[int]:
    made = model.generate(
        IDS[:, :9], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached
    )
    return list(made[0].tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lord", "basis-sharing"])
def test_every_family(tmp_path: Path, family: str, method: str) -> None:
    """Factored, saved, loaded by deltafold and by transformers alone: the same as dense."""
    model, text = write_deep(tmp_path / "model", family), write_text(tmp_path / "text.txt")
    out, dense = tmp_path / "out", tmp_path / "dense"
    record = factor(model, out, method, parameters=0.75, **settings(text))
    shapes = stored(out)
    kept = sum(math.prod(shape) for shape in shapes.values())
    assert kept == record["parameters"]["kept"] <= 0.75 * record["parameters"]["total"]
    assert record["parameters"]["kept"] > 0.73 * record["parameters"]["total"]
    assert 2 * kept == record["parameters"]["bytes"]
    roles = {row["role"]: row for row in record["roles"]}
    assert "down" in roles and all(0 < row["relative_error"] < 0.9 for row in roles.values())
    ours, theirs = deltafold.load(out, dtype=torch.float32), plain(out)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert sum(p.numel() for p in theirs.parameters()) == kept
    assert generated(theirs, True) == generated(theirs, False) == generated(ours, True)
    factor(model, dense, method, parameters=0.75, dense=True, **settings(text))
    assert stored(dense) == stored(model)
    ordinary = plain(dense)
    for name, module in ours.named_modules():
        if isinstance(module, ComposedLinear):
            rounded = module.dense_weight().bfloat16().float()
            assert torch.equal(ordinary.get_parameter(f"{name}.weight"), rounded)
    gaps = (ordinary(IDS).logits - ours(IDS).logits).abs()
    assert gaps.mean() < 0.05 * ours(IDS).logits.std()  # each weight was rounded to bf16


@pytest.mark.parametrize("method", ["svd", "lord", "bolaco", "welore", "lorc", "basis-sharing"])
def test_every_method_holds_its_total(
    llama: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    model, text = llama
    share = 0.96 if method == "lorc" else 0.7
    record = factor(model, tmp_path / "out", method, parameters=share, trials=6, text=text,
                    **settings(text))  # fmt: skip
    counted = record["parameters"]
    assert share - 0.02 < counted["parameter_share"] <= share
    assert sum(math.prod(s) for s in stored(tmp_path / "out").values()) == counted["kept"]
    assert record["quality"]["factored"]["kl"] > 0 and record["quality"]["model"]["kl"] < 1e-9
    assert (record["samples"] is None) == (method in ("svd", "welore"))
    if method == "bolaco":
        ranks = {row["role"]: row["rank"] for row in record["roles"]}
        assert ranks["v"] is None and len(record["search"]["trials"]) == 6
        values = [trial["objective"] for trial in record["search"]["trials"]]
        assert values[record["search"]["chosen"]] == min(values) and len(set(values)) > 3
    if method == "lorc":
        assert {row["role"] for row in record["roles"]} == {"k", "v"}
    if method == "basis-sharing":
        together = {row["role"]: row["blocks_together"] for row in record["roles"]}
        assert together == {"q": 2, "k": 2, "v": 2, "gate": 2, "up": 2, "o": 1, "down": 1}


def test_whitened_beats_plain_and_the_written_folder_is_what_was_measured(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = llama
    found = {
        method: factor(
            model, tmp_path / method, method, parameters=0.5, text=text, **settings(text)
        )
        for method in ("svd", "lord")
    }
    kl = {method: record["quality"]["factored"]["kl"] for method, record in found.items()}
    assert kl["lord"] < 0.5 * kl["svd"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2 moe"])
def test_experts_as_their_mean_and_deltas(tmp_path: Path, family: str) -> None:
    model, text = write_deep(tmp_path / "model", family), write_text(tmp_path / "text.txt")
    record = factor(model, tmp_path / "out", "moe", parameters=0.8, **settings(text))
    assert {row["role"] for row in record["roles"]} == {"gate_up", "down"}
    shapes = stored(tmp_path / "out")
    means = [name for name in shapes if name.endswith("_delta.mean")]
    assert len(means) == 10 and len(shapes[means[0]]) == 2
    assert not [name for name in shapes if ".experts.0." in name]
    assert sum(math.prod(shape) for shape in shapes.values()) == record["parameters"]["kept"]
    ours, theirs = deltafold.load(tmp_path / "out", dtype=torch.float32), plain(tmp_path / "out")
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert generated(theirs, True) == generated(theirs, False)


def test_a_model_without_experts_has_no_mean_of_them(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    message = refused(MismatchError, lambda: factor(llama[0], tmp_path / "x", "moe"), "experts")
    assert "lord" in message
    nothing_left(tmp_path / "x")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_centring_keeps_the_mean_by_a_bias(tmp_path: Path, family: str) -> None:
    """New biases are counted and stored; old ones change their values only."""
    model, text = write_deep(tmp_path / "model", family), write_text(tmp_path / "text.txt")
    record = factor(
        model, tmp_path / "out", "lord", parameters=0.7, centre=True, text=text, **settings(text)
    )
    before, after = stored(model), stored(tmp_path / "out")
    assert sum(math.prod(shape) for shape in after.values()) == record["parameters"]["kept"]
    biases = {name for name in after if name.endswith("_proj.bias")} - set(before)
    assert len(biases) == {"llama": 35, "qwen2": 20, "gpt2": 0}[family]
    whole = factor(model, tmp_path / "plain", "lord", parameters=0.7, text=text, **settings(text))
    error = {
        name: sum(row["relative_error"] for row in each["roles"])
        for name, each in (("centred", record), ("plain", whole))
    }
    assert error["centred"] < 3 * error["plain"]  # of the covariance, which is smaller
    ours = deltafold.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(ours(IDS).logits, plain(tmp_path / "out")(IDS).logits)
    if family == "llama":
        options = {"centre": True, "dense": True, **settings(text)}
        refused(UsageError, lambda: factor(model, tmp_path / "x", **options), "--dense")


def test_the_same_bytes_again_and_after_a_break(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = llama
    factor(model, tmp_path / "a", "basis-sharing", parameters=0.7, workers=1, **settings(text))
    save, count = FactorStore.save, [0]

    def breaking(self: FactorStore, *arguments: Any) -> int:
        count[0] += 1
        if count[0] == 9:
            raise KeyboardInterrupt
        return save(self, *arguments)

    monkeypatch.setattr(FactorStore, "save", breaking)
    with pytest.raises(KeyboardInterrupt):
        factor(model, tmp_path / "b", "basis-sharing", parameters=0.7, workers=1, **settings(text))
    assert not (tmp_path / "b").exists() and (tmp_path / "b.partial").is_dir()
    monkeypatch.setattr(FactorStore, "save", save)
    factor(model, tmp_path / "b", "basis-sharing", parameters=0.7, workers=2, **settings(text))
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second


def test_groups_of_alike_blocks(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    record = factor(
        model, tmp_path / "out", "basis-sharing", parameters=0.7, grouping="alike", group=3,
        **settings(text),
    )  # fmt: skip
    blocks = sorted(tuple(row["blocks"]) for row in record["units"] if row["role"] == "q")
    assert sorted(sum(blocks, ())) == [0, 1, 2, 3, 4] and [len(each) for each in blocks] in (
        [3, 2], [2, 3],
    )  # fmt: skip
    ours = deltafold.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(ours(IDS).logits, plain(tmp_path / "out")(IDS).logits)


def test_later_blocks_are_fitted_to_what_factored_ones_give(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first block's factors are the same either way, the last one's are not."""
    model, text = llama
    for name, sequential in (("one", True), ("two", False)):
        options = settings(text, sequential=sequential)
        factor(model, tmp_path / name, "lord", parameters=0.5, **options)
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "two") as two:
        for block, same in ((0, True), (4, False)):
            name = f"model.layers.{block}.self_attn.q_proj.delta.0.a"
            assert torch.allclose(
                one.tensor(name).float(), two.tensor(name).float(), atol=2e-2
            ) == same  # fmt: skip


def test_dry_run_says_what_would_be_stored(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    planned = factor(model, tmp_path / "out", "lord", parameters=0.7, dry_run=True)
    nothing_left(tmp_path / "out")
    done = factor(model, tmp_path / "out", "lord", parameters=0.7, **settings(text))
    assert planned["parameters"] == {k: v for k, v in done["parameters"].items() if k != "bytes"}
    # Half of a square matrix' rank saves nothing: the two shares are two fields.
    square = next(row for row in planned["roles"] if row["role"] == "q")
    assert square["rank_share"] == pytest.approx(square["parameter_share"] / 2)
    searched = factor(model, tmp_path / "x", "welore", parameters=0.7, dry_run=True)
    assert searched["parameters"]["kept_at_most"] == int(0.7 * planned["parameters"]["total"])


def test_bad_input(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = llama[0], tmp_path / "out"
    refused(UsageError, lambda: factor(model, out, "lrd"), "did you mean", "'lord'")
    message = refused(BudgetError, lambda: factor(model, out, parameters=0.01), "at least 14.8%")
    assert "not 1.0%" in message
    refused(BudgetError, lambda: factor(model, out, "lorc", parameters=0.5), "lorc")
    refused(UsageError, lambda: factor(model, out, parameters=1.2), "between 0 and 1", "1.2")
    refused(UsageError, lambda: factor(model, out, grouping="alik"), "'alike'")
    refused(UsageError, lambda: factor(model, out, group=0), "group")
    refused(UsageError, lambda: factor(model, out, trials=0), "trials")
    refused(UsageError, lambda: factor(model, out, damping=2.0), "damping")
    refused(UsageError, lambda: factor(model, out, "svd", centre=True), "svd")
    refused(UsageError, lambda: factor(model, out, calibration="none"), "--calibration")
    refused(CheckpointError, lambda: factor(tmp_path, out), "safetensors")
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "config.json").unlink()
    refused(CheckpointError, lambda: factor(bare, out, "svd"), "config.json")
    quantised = shutil.copytree(model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "x"}})
    )
    refused(MismatchError, lambda: factor(quantised, out, "svd"), "quantised")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(SampleError, lambda: factor(model, out, calibration=empty), "no text")
    nothing_left(out)
    out.mkdir()
    (out / "file").write_text("mine")
    refused(UsageError, lambda: factor(model, out), "exists")


def test_a_candidate_without_factors_is_the_model(llama: tuple[Path, Path]) -> None:
    from deltafold.factoring.job import make_job
    from deltafold.factoring.methods.presets import Method

    with open_checkpoint(llama[0]) as checkpoint:
        request = FactorRequest(llama[0], "output", parameters=0.7)
        job = make_job(checkpoint, Method.of("lord"), request)
        candidate = Candidate(job, None, [5] * len(job.units))
        for name in checkpoint.tensors:
            assert torch.equal(candidate.tensor(name), checkpoint.tensor(name))


def test_a_former_name_goes_on_working(
    llama: tuple[Path, Path], tmp_path: Path, deltafold: Any
) -> None:
    line = ["factor", llama[0], "-o", tmp_path / "out", "--dry-run", "--json"]
    made = deltafold(*line, "--measure", llama[1])
    assert made.returncode == 0 and json.loads(made.stdout)["settings"]["text"] == str(llama[1])
    assert "--measure is called --text now" in made.stderr


def test_the_command(llama: tuple[Path, Path], tmp_path: Path, deltafold: Any) -> None:
    from deltafold.reporting.tables import tables_of

    model, text = llama
    out = tmp_path / "out"
    planned = deltafold("factor", model, "-o", out, "--parameters", "0.7", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "122,304 of 174,784 parameters stay (70.0%)" in planned.stdout and not out.exists()
    done = deltafold(
        "factor", model, "-o", out, "-m", "bolaco", "--parameters", "0.7", "--trials", "4",
        "--calibration", text, "--max-tokens", "40", "--text", text,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best of 4 splits" in done.stdout and "factored: perplexity" in done.stdout
    record = json.loads((tmp_path / "out.record.json").read_text())
    shown = "\n".join(table.markdown() for table in tables_of(record))
    assert "splits tried" in shown and "ranks by block" in shown and "| down |" in shown
    wrong = deltafold("factor", model, "-o", tmp_path / "x", "-m", "lrd")
    assert wrong.returncode == 2 and "did you mean 'lord'" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
