"""Pairs whose sides name or arrange their tensors differently: deltas, and every bit back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import format_reader as reader
import pytest
import torch
from checkpoints import (
    BLOCKS,
    MIDDLE,
    VOCABULARY,
    WIDTH,
    Tensors,
    base_tensors,
    make_pair,
    read_checkpoint,
    same_bits,
    tuned_tensors,
    write_checkpoint,
)

from deltafold import compress, restore, verify
from deltafold.archive import Archive
from deltafold.errors import MismatchError
from deltafold.restoring.load import load_state

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS, INNER = 4, 32


def put(folder: Path, base: Tensors, tuned: Tensors, **config: object) -> tuple[Path, Path]:
    return (
        write_checkpoint(folder / "base", base, config=config or None),
        write_checkpoint(folder / "finetuned", tuned, config=config or None),
    )


def there_and_back(folder: Path, base: Path, tuned: Path, method: str = "lossless") -> Archive:
    """Compress and restore; an exact method gives every bit, read by whichever reader."""
    out = folder / f"{method}.delta"
    budget = {} if method == "lossless" else {"file_ratio": 3}
    compress(base, tuned, out, method, calibration="none", **budget)
    restore(out, base, folder / f"{method}-restored")
    wanted, found = read_checkpoint(tuned), read_checkpoint(folder / f"{method}-restored")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    if method == "lossless":
        assert same_bits(found, wanted)
        assert same_bits(load_state(out, base), wanted)
        plain = reader.restore(out, base)
        assert {n: each.data for n, each in plain.items()} == {
            n: each.data for n, each in reader.read_folder(tuned).items()
        }
        assert verify(out, base, tuned)["relative_error"] == 0
    return Archive(out)


def whole(archive: Archive) -> list[str]:
    """Tensors that are stored without the base."""
    return [t.name for t in archive.manifest.tensors if t.base is None and not t.same_as]


def in_blocks(word: str) -> Callable[[str], str]:
    return lambda name: name.replace("self_attn.", f"{word}.self_attn.").replace(
        "mlp.", f"{word}.mlp."
    )


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "compiled and data parallel": lambda name: f"module._orig_mod.{name}",
    "sharded": lambda name: f"_fsdp_wrapped_module.{name}",
    "engine of a trainer": lambda name: f"_forward_module.model.{name}",
    "lightning": lambda name: f"model.{name}",
    "any word": lambda name: f"policy.student.{name}",
    "peft": lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
    "checkpointed blocks": in_blocks("_checkpoint_wrapped_module"),
    "compiled blocks": in_blocks("_orig_mod"),
    "compiled blocks and a prefix": lambda name: "model." + in_blocks("_orig_mod")(name),
    "another name for attention": lambda name: name.replace("self_attn", "attn"),
    "moved prefix": lambda name: name.replace("model.layers", "model.language_model.layers"),
}


@pytest.mark.parametrize("swapped", [False, True], ids=["on the fine-tune", "on the base"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_that_differ_by_a_fixed_part(tmp_path: Path, wrapper: str, swapped: bool) -> None:
    base = base_tensors()
    tuned = tuned_tensors(base)
    named = {WRAPPERS[wrapper](name): t for name, t in (base if swapped else tuned).items()}
    folders = put(tmp_path, named if swapped else base, tuned if swapped else named)
    archive = there_and_back(tmp_path, *folders)
    assert not whole(archive) and not archive.manifest.removed
    assert archive.manifest.format_version == 2


def test_a_wrapped_fine_tune_is_approximated_as_a_plain_one(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = {f"_orig_mod.{name}": t for name, t in tuned_tensors(base).items()}
    folders = put(tmp_path, base, tuned)
    archive = there_and_back(tmp_path, *folders, method="auto")
    errors = [p.error for t in archive.manifest.tensors for p in t.pieces if p.error is not None]
    assert errors and max(errors) < 1


def test_the_inner_model_without_its_prefix_and_without_a_head(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = {n.removeprefix("model."): t for n, t in tuned_tensors(base).items() if n != HEAD}
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    assert not whole(archive)
    assert list(archive.manifest.removed) == [HEAD]


def test_the_whole_model_over_the_inner_one(tmp_path: Path) -> None:
    outer = base_tensors()
    inner = {n.removeprefix("model."): t for n, t in outer.items() if n != HEAD}
    archive = there_and_back(tmp_path, *put(tmp_path, inner, tuned_tensors(outer)))
    assert whole(archive) == [HEAD]


def test_two_towers_of_one_shape_are_not_mixed_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {
        f"{tower}_model.encoder.layers.{n}.mlp.fc1.weight": torch.randn(64, 32)
        for tower in ("text", "vision")
        for n in range(3)
    }
    tuned = {f"clip.{n}": t + 0.01 * torch.randn(64, 32) for n, t in base.items()}
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    assert {t.name: t.counterpart[0].name for t in archive.manifest.tensors} == {
        f"clip.{name}": name for name in base
    }


def test_an_unlike_tensor_under_a_like_name_is_no_counterpart(tmp_path: Path) -> None:
    """Names can mislead: what is farther off than zeros is stored whole, and no delta codec's."""
    base = base_tensors()
    tuned = {f"module.{name}": t for name, t in tuned_tensors(base).items()}
    name = "module.model.layers.0.mlp.up_proj.weight"
    torch.manual_seed(5)
    tuned[name] = (0.05 * torch.randn(MIDDLE, WIDTH)).bfloat16()
    folders = put(tmp_path, base, tuned)
    assert whole(there_and_back(tmp_path, *folders)) == [name]
    there_and_back(tmp_path, *folders, method="svd-quant")
    restored = read_checkpoint(tmp_path / "svd-quant-restored")
    assert torch.equal(restored[name], tuned[name])


def test_names_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = {f"weight{n}": torch.zeros(7, 5) for n in range(3)}
    folders = put(tmp_path, base, tuned)
    with pytest.raises(MismatchError, match="no tensor name in common"):
        compress(*folders, tmp_path / "x.delta")


# --- rearranged -----------------------------------------------------------------------------------


def experts(names: tuple[str, str, str], block: str, tensors: Tensors) -> Tensors:
    gate, up, down = names
    found = {}
    for block_n in range(BLOCKS):
        for e in range(EXPERTS):
            stem = f"model.layers.{block_n}.{block}.experts.{e}"
            found[f"{stem}.{gate}.weight"] = tensors[f"{block_n}.{e}.gate"]
            found[f"{stem}.{up}.weight"] = tensors[f"{block_n}.{e}.up"]
            found[f"{stem}.{down}.weight"] = tensors[f"{block_n}.{e}.down"]
        found[f"model.layers.{block_n}.{block}.gate.weight"] = tensors[f"{block_n}.router"]
    return found


def fused_experts(tensors: Tensors) -> Tensors:
    found = {}
    for n in range(BLOCKS):
        stem = f"model.layers.{n}.mlp"
        both = [
            torch.cat([tensors[f"{n}.{e}.gate"], tensors[f"{n}.{e}.up"]]) for e in range(EXPERTS)
        ]
        found[f"{stem}.experts.gate_up_proj"] = torch.stack(both)
        found[f"{stem}.experts.down_proj"] = torch.stack(
            [tensors[f"{n}.{e}.down"] for e in range(EXPERTS)]
        )
        found[f"{stem}.gate.weight"] = tensors[f"{n}.router"]
    return found


def mixture(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    made = {
        f"{n}.{e}.{kind}": torch.randn(*shape, generator=generator)
        for n in range(BLOCKS)
        for e in range(EXPERTS)
        for kind, shape in shapes.items()
    }
    made |= {f"{n}.router": torch.randn(EXPERTS, WIDTH, generator=generator) for n in range(BLOCKS)}
    return {name: t.bfloat16() for name, t in made.items()}


ARRANGEMENTS: dict[str, Callable[[Tensors], Tensors]] = {
    "qwen": lambda t: experts(("gate_proj", "up_proj", "down_proj"), "mlp", t),
    "mixtral": lambda t: experts(("w1", "w3", "w2"), "block_sparse_moe", t),
    "fused": fused_experts,
    "fused, wrapped": lambda t: {f"_orig_mod.{n}": x for n, x in fused_experts(t).items()},
}


@pytest.mark.parametrize("theirs", ARRANGEMENTS)
@pytest.mark.parametrize("ours", ARRANGEMENTS)
def test_experts_fused_or_apart(tmp_path: Path, ours: str, theirs: str) -> None:
    before = mixture()
    after = {n: (t.float() + 0.01 * torch.randn(t.shape)).bfloat16() for n, t in before.items()}
    folders = put(tmp_path, ARRANGEMENTS[theirs](before), ARRANGEMENTS[ours](after))
    archive = there_and_back(tmp_path, *folders)
    assert not whole(archive) and not archive.manifest.removed


def joined(tensors: Tensors) -> Tensors:
    """Llama's projections as Phi-3 keeps them."""
    made = dict(tensors)
    for n in range(BLOCKS):
        stem = f"model.layers.{n}"
        attention = [made.pop(f"{stem}.self_attn.{x}_proj.weight") for x in "qkv"]
        made[f"{stem}.self_attn.qkv_proj.weight"] = torch.cat(attention)
        mlp = [made.pop(f"{stem}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        made[f"{stem}.mlp.gate_up_proj.weight"] = torch.cat(mlp)
    return made


@pytest.mark.parametrize("side", ["base", "fine-tune"])
def test_projections_joined_or_apart(tmp_path: Path, side: str) -> None:
    base = base_tensors()
    tuned = tuned_tensors(base)
    folders = put(
        tmp_path,
        joined(base) if side == "base" else base,
        joined(tuned) if side == "fine-tune" else tuned,
    )
    archive = there_and_back(tmp_path, *folders)
    assert not whole(archive) and not archive.manifest.removed
    there_and_back(tmp_path, *folders, method="auto")


def test_shapes_tell_apart_what_names_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {f"layers.{n}.moe.input_linear.weight": torch.randn(4, 96, 32) for n in range(2)}
    base |= {f"layers.{n}.moe.output_linear.weight": torch.randn(4, 32, 48) for n in range(2)}
    names = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down"}
    tuned = {}
    for name, tensor in base.items():
        stem, _, leaf = name.partition("moe.")
        tuned[f"{stem}moe.{names[leaf]}"] = tensor + 0.01 * torch.randn(tensor.shape)
    assert not whole(there_and_back(tmp_path, *put(tmp_path, base, tuned)))


def test_the_base_must_be_the_one_also_where_rows_are_joined(tmp_path: Path) -> None:
    base = base_tensors()
    folders = put(tmp_path, base, joined(tuned_tensors(base)))
    archive = there_and_back(tmp_path, *folders).folder
    base["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1
    other = write_checkpoint(tmp_path / "other", base)
    with pytest.raises(MismatchError, match="qkv_proj"):
        restore(archive, other, tmp_path / "r")
    del base["model.layers.1.self_attn.v_proj.weight"]
    lacking = write_checkpoint(tmp_path / "lacking", base)
    with pytest.raises(MismatchError, match="v_proj"):
        restore(archive, lacking, tmp_path / "r")


# --- vocabulary and heads -------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["output.weight", "head.weight", "generator.proj.weight"])
def test_a_head_of_any_name_may_grow_with_the_vocabulary(tmp_path: Path, head: str) -> None:
    torch.manual_seed(0)
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    for side in (base, tuned):
        side[head] = side.pop(HEAD)
    for name in (EMBEDDING, head):
        tuned[name] = torch.cat([tuned[name], torch.randn(3, WIDTH).bfloat16()])
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    rows = [piece.rows for piece in archive.by_name[head].pieces]
    assert rows == [(0, VOCABULARY), (VOCABULARY, VOCABULARY + 3)]


@pytest.mark.parametrize("shape", ["flat", "row"])
@pytest.mark.parametrize("name", ["lm_head.bias", "cls.predictions.bias", "final_logits_bias"])
def test_a_bias_as_long_as_the_vocabulary_may_grow(tmp_path: Path, name: str, shape: str) -> None:
    torch.manual_seed(0)
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    tuned[EMBEDDING] = torch.cat([tuned[EMBEDDING], torch.randn(3, WIDTH).bfloat16()])
    base[name], tuned[name] = torch.randn(VOCABULARY), torch.randn(VOCABULARY + 3)
    if shape == "row":
        base[name], tuned[name] = base[name][None], tuned[name][None]
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    assert whole(archive) == [name]
    assert "in the base" in (archive.by_name[name].pieces[0].why or "")


def test_a_classifier_may_get_other_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    for side, labels in ((base, 2), (tuned, 5)):
        side["classifier.weight"], side["classifier.bias"] = (
            torch.randn(labels, WIDTH),
            torch.randn(labels),
        )
    there_and_back(tmp_path, *put(tmp_path, base, tuned))


@pytest.mark.parametrize("method", ["lossless", "auto", "svd-quant"])
def test_an_untied_copy_of_the_embedding_costs_nothing(tmp_path: Path, method: str) -> None:
    """The head comes first in the file; the embedding is what the base has."""
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    del base[HEAD]
    torch.manual_seed(0)
    tuned[EMBEDDING] = (base[EMBEDDING].float() + 0.01 * torch.randn(VOCABULARY, WIDTH)).bfloat16()
    tuned = {HEAD: tuned[EMBEDDING].clone()} | {n: t for n, t in tuned.items() if n != HEAD}
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned), method=method)
    assert not whole(archive)
    stored = [name for name in (HEAD, EMBEDDING) if archive.by_name[name].pieces]
    assert len(stored) == 1
    restored = read_checkpoint(tmp_path / f"{method}-restored")
    assert torch.equal(restored[HEAD], restored[EMBEDDING])


@pytest.mark.parametrize("head", [HEAD, "output.weight"])
def test_a_head_trained_apart_refers_to_the_embedding(tmp_path: Path, head: str) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    del base[HEAD], tuned[HEAD]
    torch.manual_seed(0)
    tuned[head] = (base[EMBEDDING].float() + 0.01 * torch.randn(VOCABULARY, WIDTH)).bfloat16()
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    assert [each.name for each in archive.by_name[head].counterpart] == [EMBEDDING]


def test_a_head_of_its_own_is_stored_whole_and_exactly(tmp_path: Path) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    del base[HEAD]
    torch.manual_seed(7)
    tuned[HEAD] = (0.05 * torch.randn(VOCABULARY, WIDTH)).bfloat16()
    archive = there_and_back(tmp_path, *put(tmp_path, base, tuned))
    assert whole(archive) == [HEAD]


def test_the_embedding_stored_as_the_head(tmp_path: Path) -> None:
    """Writers that store shared tensors once may keep either name."""
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    del base[HEAD]
    tuned[HEAD] = tuned.pop(EMBEDDING)
    assert not whole(there_and_back(tmp_path, *put(tmp_path, base, tuned)))


# --- said -----------------------------------------------------------------------------------------


def test_a_plain_pair_is_stored_as_ever(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    archive = there_and_back(tmp_path, pair.base, pair.finetuned)
    raw = json.loads((archive.folder / "delta.json").read_text())
    assert "counterpart" not in (archive.folder / "delta.json").read_text()
    assert raw["format_version"] == 3  # for the digest of the config's frame alone
    assert [entry["name"] for entry in raw["files"] if "frame" in entry] == ["config.json"]
