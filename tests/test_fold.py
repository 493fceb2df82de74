"""`fold`: one merge by hand, every method, what the record says, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tree_hashes
from folding_models import DEPTH, write_deep, write_text
from safetensors.torch import load_file, save_file

from deltafold import fold
from deltafold.errors import CheckpointError, DeltafoldError, MismatchError, UsageError
from deltafold.folding.methods import METHODS, PRESETS
from deltafold.folding.patch import Patcher
from deltafold.reporting.tables import tables_of

pytestmark = pytest.mark.integration

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("llama"), "llama")


def run(model: Path, out: Path, method: str, words: Path, **options: Any) -> dict[str, Any]:
    options = {"blocks": 1, "max_tokens": 40} | options
    return fold(model, out, method, calibration=words, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_merge_is_the_weighted_sum_of_both_parents(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    record = run(llama, tmp_path / "out", "mka", text)
    (step,) = record["steps"]
    low, high, ratio = step["kept"], step["gone"][0], step["ratio"]
    assert high == low + 1 and 0 < ratio < 1 and ratio == pytest.approx(step["score"])
    old, new = weights(llama), weights(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == DEPTH - 1
    blocks = {name.split(".")[2] for name in new if ".layers." in name}
    assert blocks == {str(n) for n in range(DEPTH - 1)}
    for name in PROJECTIONS:
        part = "mlp" if name in PROJECTIONS[4:] else "self_attn"
        a, b, made = (
            found[f"model.layers.{n}.{part}.{name}.weight"].float()
            for found, n in ((old, low), (old, high), (new, low))
        )
        wanted = (ratio * a + (1 - ratio) * b).bfloat16().float()
        assert torch.allclose(made, wanted, rtol=2**-7, atol=1e-6), name
        assert not torch.equal(made, a)
    for n in range(DEPTH):
        if n not in (low, high):
            at = n if n < low else n - 1
            name = "mlp.down_proj.weight"
            assert torch.equal(old[f"model.layers.{n}.{name}"], new[f"model.layers.{at}.{name}"])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(old[name], new[name])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_shallower_model(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    record = run(llama, tmp_path / "out", method, text, blocks=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    left = len(record["kept"])
    assert model.config.num_hidden_layers == left
    if method != "jointdrop":
        assert left == DEPTH - 2 and record["removed"]["layer_share"] == 2 / DEPTH
    written = sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert record["parameters"] - written == record["removed"]["parameters"]
    assert json.loads((tmp_path / "out.record.json").read_text()) == record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.record.json"]


def test_ratios_and_recomputation(llama: Path, text: Path, tmp_path: Path) -> None:
    """The second pair is chosen on the model with the first one merged, and explained."""
    record = run(
        llama, tmp_path / "out", "mka", text, blocks=2, explain=tmp_path / "why", similarity="cka"
    )
    tables = sorted((tmp_path / "why").glob("similarity-*.csv"))
    rows = [len(table.read_text().splitlines()) for table in tables]
    assert rows == [DEPTH + 2, DEPTH + 1]
    first, second = (table.read_text().splitlines() for table in tables)
    kept = record["steps"][0]["kept"]
    changed = [line.split(",")[0] for line in second[1:] if line not in first]
    assert f"block {kept}" in changed
    steps = json.loads((tmp_path / "why/steps.json").read_text())
    assert steps["steps"] == record["steps"]
    points = (tmp_path / "why/embedding.csv").read_text().splitlines()
    assert points[0] == "state,sample,x1,x2" and len(points) > (DEPTH + 1) * 8


def test_a_merge_of_a_merge_holds_three_blocks(llama: Path, text: Path, tmp_path: Path) -> None:
    record = run(llama, tmp_path / "out", "mka-reference", text, blocks=2)
    assert [step["gone"] for step in record["steps"]] == [[4], [3]]
    assert all(0.5 < step["ratio"] < 0.7311 for step in record["steps"])
    assert record["parts"][-1] == {"block": 2, "parts": [2, 3, 4]}
    old, new = weights(llama), weights(tmp_path / "out")
    a, b = (step["ratio"] for step in record["steps"])
    name = "model.layers.{}.mlp.up_proj.weight"
    two, three, four = (old[name.format(n)].float() for n in (2, 3, 4))
    wanted = b * two + (1 - b) * (a * three + (1 - a) * four)
    assert torch.allclose(new[name.format(2)].float(), wanted, rtol=2**-7, atol=1e-5)
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(new[norm], old[norm])


def test_the_same_bytes_each_time(llama: Path, text: Path, tmp_path: Path) -> None:
    for name, options in (("one", {}), ("two", {"workers": 2, "memory_bytes": 200_000})):
        run(llama, tmp_path / name, "auto", text, blocks=2, **options)
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")


def test_protected_blocks_stay(llama: Path, text: Path, tmp_path: Path) -> None:
    for method in ("shortgpt", "mka", "reverse", "angular"):
        record = run(llama, tmp_path / method, method, text, protect=[-1, 3])
        assert {3, 4} <= set(record["kept"])
        assert not {3, 4} & {step["kept"] for step in record["steps"]} or method != "mka"


def test_parameters_kept(llama: Path, text: Path, tmp_path: Path) -> None:
    record = run(llama, tmp_path / "out", "shortgpt", text, blocks=None, parameters=0.7)
    share = record["removed"]["parameter_share"]
    assert share >= 0.3 > share - record["block_parameters"] / record["parameters"]
    assert share != record["removed"]["layer_share"]


def test_joint_drop_says_what_is_silent(llama: Path, text: Path, tmp_path: Path) -> None:
    record = run(llama, tmp_path / "out", "jointdrop", text, blocks=2)
    assert len(record["steps"]) == 4
    new = weights(tmp_path / "out")
    for row in record["silenced"]:
        place = record["kept"].index(row["block"])
        last = "self_attn.o_proj" if row["part"] == "attention" else "mlp.down_proj"
        assert not new[f"model.layers.{place}.{last}.weight"].any()
    both = len(record["removed"]["blocks"])
    assert 2 * both + len(record["silenced"]) == 4
    assert (record["silenced_parameter_share"] > 0) == bool(record["silenced"])


def test_joint_drop_takes_sublayers_until_the_share_is_reached(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    record = run(llama, tmp_path / "out", "jointdrop", text, blocks=None, parameters=0.8)
    sizes = {
        part: sum(
            math.prod(value.shape)
            for name, value in weights(llama).items()
            if name.startswith(f"model.layers.0.{key}")
        )
        for part, key in (("attention", "self_attn"), ("mlp", "mlp"))
    }
    gone = [sizes[step["part"]] for step in record["steps"]]
    total = record["parameters"]
    assert sum(gone) >= 0.2 * total > sum(gone[:-1])
    assert record["asked"]["blocks"] is None
    removed = record["removed"]["parameter_share"] + record["silenced_parameter_share"]
    assert removed >= 0.2
    scores = [step["score"] for step in record["steps"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("reach", ["cut", "through"])
def test_healing_brings_states_nearer(reach: str, llama: Path, text: Path, tmp_path: Path) -> None:
    record = run(llama, tmp_path / "out", "angular", text, blocks=2, closed_form=reach)
    assert record["patches"]
    for row in record["patches"]:
        assert row["error_after"] <= row["error_before"]
    assert any(row["kept"] for row in record["patches"])
    plain = run(llama, tmp_path / "plain", "angular", text, blocks=2)
    assert plain["removed"] == record["removed"] and not plain["patches"]


def test_attention_is_healed_as_well_after_the_first_cut(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    record = run(llama, tmp_path / "out", "angular", text, blocks=1, protect=[0, -1],
                 closed_form="through")  # fmt: skip
    cut = record["removed"]["blocks"][0] - 1
    parts = {(row["block"], row["part"]) for row in record["patches"]}
    later = [number for number in record["kept"] if number > cut]
    assert parts == {(cut, "mlp")} | {(n, p) for n in later for p in ("attention", "mlp")}
    attention = [row for row in record["patches"] if row["part"] == "attention" and row["kept"]]
    assert attention
    old, new = weights(llama), weights(tmp_path / "out")
    for row in attention:
        place = record["kept"].index(row["block"])
        name = "self_attn.o_proj.weight"
        assert not torch.equal(
            new[f"model.layers.{place}.{name}"], old[f"model.layers.{row['block']}.{name}"]
        )


def test_training_what_is_left_brings_it_nearer(llama: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    much = write_text(tmp_path / "much.txt", samples=200)
    record = run(llama, out, "reverse", much, blocks=2, steps=40, text=text)
    exams = record["healing"]["exams"]
    assert exams[0]["step"] == 0 and min(e["kl"] for e in exams) < exams[0]["kl"]
    assert record["quality"]["healed"]["kl"] < record["quality"]["folded"]["kl"]
    plain = run(llama, tmp_path / "plain", "reverse", text, blocks=2)
    assert plain["kept"] == record["kept"]
    one, two = weights(out), weights(tmp_path / "plain")
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype for name in one)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    titles = [table.title for table in tables_of(record)]
    assert "training" in titles


def test_training_broken_off_goes_on_to_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    def stop(step: Any) -> None:
        if step.stage == "heal" and step.done == 7:
            raise KeyboardInterrupt

    def healed(out: Path, **settings: Any) -> None:
        run(llama, out, "reverse", text, blocks=2, steps=12, **settings)

    with pytest.raises(KeyboardInterrupt):
        healed(tmp_path / "broken", progress=stop)
    assert not (tmp_path / "broken").exists()
    seen: list[float] = []
    healed(
        tmp_path / "broken",
        progress=lambda step: seen.append(step.done) if step.stage == "heal" else None,
    )
    assert seen[0] == 7  # the last look was after step 6
    healed(tmp_path / "whole")
    one, two = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_replace_me_solves_its_equation(llama: Path, text: Path, tmp_path: Path) -> None:
    """On the very samples: with the patch the block's output is nearer to the last removed one's."""
    from deltafold.calibration import Sampling, StreamedModel, gather_samples, make_batches

    record = run(llama, tmp_path / "out", "replaceme", text, blocks=2)
    plain = run(llama, tmp_path / "plain", "replaceme", text, blocks=2, rule="drop")
    assert plain["removed"] == record["removed"]
    gone = record["removed"]["blocks"]
    batches = make_batches(gather_samples(llama, Sampling(text, max_tokens=40)))
    gaps = {}
    with StreamedModel(llama).forward(batches, keep=True) as whole:
        for name in ("out", "plain"):
            kept = range(gone[0])
            with StreamedModel(tmp_path / name).forward(batches, blocks=kept) as done:
                gaps[name] = sum(
                    float((done.last[n] - whole.stores[gone[-1] + 1][n])[b.real].square().sum())
                    for n, b in enumerate(batches)
                )
    assert gaps["out"] < 0.9 * gaps["plain"]


@pytest.mark.parametrize("method", ["replaceme", "replaceme-cosine"])
def test_a_named_patch_is_not_turned_down(
    method: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its paper has it do is done, also where by our measure it does harm."""
    monkeypatch.setattr(Patcher, "_error", lambda *given: 1e9)
    record = run(llama, tmp_path / "out", method, text, blocks=2)
    plain = run(llama, tmp_path / "plain", method, text, blocks=2, rule="drop")
    (row,) = record["patches"]
    assert row["kept"] and row["error_after"] == 1e9
    name = f"model.layers.{row['block']}.mlp.down_proj.weight"
    assert not torch.equal(weights(tmp_path / "out")[name], weights(tmp_path / "plain")[name])
    assert plain["removed"] == record["removed"]


def test_the_ends_are_protected_in_mka(llama: Path, text: Path, tmp_path: Path) -> None:
    """Unless another choice is made, none included."""
    record = run(llama, tmp_path / "two", "mka", text, blocks=2)
    assert record["settings"]["protect"] == [0, -1]
    merged = {n for step in record["steps"] for n in (step["kept"], *step["gone"])}
    assert merged == {1, 2, 3}
    refused(
        tmp_path, UsageError, r"at most 2 can go \(2 protected\), not 3", llama, "mka", blocks=3
    )
    record = run(llama, tmp_path / "all", "mka", text, blocks=4, protect=[])
    assert record["kept"] == [0] and record["settings"]["protect"] == []


def test_laco_reference_leaves_the_last_block_of_a_group(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    record = run(llama, tmp_path / "out", "laco-reference", text, blocks=2)
    (step,) = record["steps"]
    first, last = step["kept"], step["gone"][-1]
    assert step["gone"] == [first + 1, first + 2] and step["ratio"] is None
    assert step["score"] > step["threshold"] and step["threshold"] <= 0.75
    old, new = weights(llama), weights(tmp_path / "out")
    for name, at in (("mlp.up_proj", last), ("self_attn.o_proj", last), ("input_layernorm", first)):
        made, wanted = (f"model.layers.{n}.{name}.weight" for n in (first, at))
        assert torch.equal(new[made], old[wanted])


def test_auto_is_block_influence_healed_through(llama: Path, text: Path, tmp_path: Path) -> None:
    auto = run(llama, tmp_path / "auto", "auto", text, blocks=2)
    healed = run(llama, tmp_path / "out", "shortgpt", text, blocks=2, closed_form="through")
    plain = run(llama, tmp_path / "plain", "auto", text, blocks=2, closed_form="none")
    assert auto["settings"]["closed_form"] == "through" and auto["patches"] == healed["patches"]
    made = [tree_hashes(tmp_path / name)["model.safetensors"] for name in ("auto", "out", "plain")]
    assert made[0] == made[1] != made[2] and not plain["patches"]


def test_sharded_and_side_files(llama: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fold(llama, tmp_path / "out", "reverse", blocks=2, shard_bytes=60_000, calibration="none")
    out = tmp_path / "out"
    assert len(list(out.glob("*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(out)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    found = fold(llama, tmp_path / "out", "mka", blocks=2, dry_run=True)
    assert found["asked"]["layer_share"] == 2 / DEPTH and found["blocks"] == DEPTH
    assert list(tmp_path.iterdir()) == []


def refused(folder: Path, error: type[DeltafoldError], match: str, *args: Any, **more: Any) -> None:
    with pytest.raises(error, match=match):
        fold(args[0], folder / "out", *args[1:], **({"blocks": 1} | more))
    left = [path.name for path in folder.iterdir() if path.name.startswith("out")]
    assert left == []


def test_what_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    refused(tmp_path, UsageError, "did you mean 'shortgpt'", llama, "shortgtp")
    refused(tmp_path, UsageError, "has 5 blocks, of which at most 4 can go, not 5", llama,
            "reverse", blocks=5)  # fmt: skip
    refused(tmp_path, UsageError, r"at most 3 can go \(2 protected\), not 4", llama, "shortgpt",
            blocks=4, protect=[0, -1])  # fmt: skip
    refused(tmp_path, UsageError, "blocks 0 to 4, so block 7 cannot be protected", llama,
            "shortgpt", protect=[7])  # fmt: skip
    refused(tmp_path, UsageError, "give at least 1", llama, "mka", blocks=0)
    refused(tmp_path, UsageError, "take one of the two", llama, "linearpatch-scale",
            closed_form="through")  # fmt: skip
    refused(tmp_path, UsageError, "either blocks", llama, "mka", blocks=None)
    refused(tmp_path, UsageError, "either blocks", llama, "mka", parameters=0.5)
    refused(tmp_path, UsageError, r"keeps \d+\.\d% of its parameters, not 1\.0%", llama, "mka",
            blocks=None, parameters=0.01)  # fmt: skip
    refused(tmp_path, UsageError, "between 0 and 1", llama, "mka", blocks=None, parameters=1.5)
    refused(tmp_path, UsageError, "looks at what the model does on text", llama, "mka",
            calibration="none")  # fmt: skip
    refused(tmp_path, UsageError, "no healing 'cuts'", llama, "mka", closed_form="cuts")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(tmp_path, DeltafoldError, "holds no text to calibrate on", llama, "mka",
            calibration=empty)  # fmt: skip
    refused(tmp_path, CheckpointError, "does not exist", tmp_path / "nowhere", "mka")


def test_damaged_models_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(llama, tmp_path / "broken")
    tensors = weights(broken)
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].contiguous()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(tmp_path, MismatchError, r"layers\.3\.mlp\.up_proj\.weight is \[88, 64\], but \[96, 64\]",
            broken, "reverse")  # fmt: skip
    (broken / "config.json").unlink()
    refused(tmp_path, CheckpointError, "no config.json", broken, "reverse")
    infinite = shutil.copytree(llama, tmp_path / "infinite")
    tensors = weights(infinite)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, infinite / "model.safetensors", {"format": "pt"})
    refused(tmp_path, DeltafoldError, r"model\.layers\.3\.mlp\.up_proj\.weight", infinite,
            "random", protect=[3])  # fmt: skip


def test_presets_are_not_all_alike(llama: Path, text: Path, tmp_path: Path) -> None:
    """Merging rules give another model than dropping the same block."""
    hashes = set()
    for rule in ("drop", "average", "collapse", "concatenate", "aligned-average", "replace-me"):
        run(llama, tmp_path / rule, "shortgpt", text, rule=rule, protect=[0, 1, 2, 4])
        hashes.add(tree_hashes(tmp_path / rule)["model.safetensors"])
    assert len(hashes) == 6
    assert len(PRESETS) == 15


def test_sleb_removes_what_costs_least_perplexity(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against models in memory, each without one block."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("deltafold.calibration.stream.multiplies_bf16", lambda device: False)
    from deltafold.calibration import Sampling, gather_samples

    record = run(llama, tmp_path / "out", "sleb", text)
    samples = gather_samples(llama, Sampling(text, max_tokens=40))

    def lost(gone: int | None) -> float:
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        blocks = model.model.layers
        model.model.layers = torch.nn.ModuleList(b for n, b in enumerate(blocks) if n != gone)
        total, count = 0.0, 0
        for sample in samples:
            ids = torch.tensor([sample.ids])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(sample.ids) - 1
        return total / count

    costs = {gone: lost(gone) for gone in range(DEPTH)}
    assert record["removed"]["blocks"] == [min(costs, key=lambda gone: costs[gone])]
    rise = min(costs.values()) - lost(None)
    assert -record["steps"][0]["score"] == pytest.approx(rise, abs=1e-4)


def test_quality_is_that_of_the_folder_written(llama: Path, text: Path, tmp_path: Path) -> None:
    from deltafold.calibration import Judge, Sampling, StreamedModel, gather_samples

    record = run(llama, tmp_path / "out", "angular", text, blocks=2, text=text, closed_form="cut")
    stages = record["quality"]
    assert list(stages) == ["model", "unhealed", "folded"]
    assert stages["model"]["kl"] == pytest.approx(0, abs=1e-9) and stages["model"]["agreement"] == 1
    samples = gather_samples(llama, Sampling(text, max_tokens=40))
    with Judge(StreamedModel(tmp_path / "out"), None, samples) as judge:
        written = judge.teacher_logits(0, judge.tokens)
    with Judge(StreamedModel(llama), None, samples) as judge:
        teacher = judge.teacher_logits(0, judge.tokens)
    kl = torch.nn.functional.kl_div(
        written.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    # What is written is rounded to bf16 once.
    assert stages["folded"]["kl"] == pytest.approx(float(kl), rel=0.05)
    assert stages["unhealed"]["kl"] != stages["folded"]["kl"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_after_folding(kind: str, llama: Path, text: Path, tmp_path: Path) -> None:
    """Saved, loaded by transformers again, and near to the folded model."""
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    record = run(llama, tmp_path / "out", "reverse", text, quantize=kind, text=text)
    run(llama, tmp_path / "plain", "reverse", text)
    ids = torch.arange(3, 35)[None]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").eval()
        for name in ("out", "plain")
    ]
    with torch.no_grad():
        found, wanted = (model(ids).logits.float() for model in models)
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < (0.05 if kind == "int8" else 0.5)
    stages = record["quality"]
    assert list(stages) == ["model", "folded", "quantised"]
    assert stages["quantised"]["perplexity"] == pytest.approx(
        stages["folded"]["perplexity"], rel=0.05 if kind == "int8" else 0.5
    )
    assert (tmp_path / "out/tokenizer.json").is_file()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "plain")]
    assert sizes[0] < 0.8 * sizes[1]


def test_a_quantisation_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    refused(tmp_path, UsageError, "did you mean 'int8'", llama, "reverse", quantize="int88")
