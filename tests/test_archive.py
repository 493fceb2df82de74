"""What an archive holds, and that what comes back is what went in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    PairFiles,
    Tensors,
    make_pair,
    read_checkpoint,
    same_bits,
    tree_hashes,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file, save_file

from deltafold import compress, inspect, restore, verify
from deltafold.archive import Archive, read_manifest
from deltafold.archive.writer import payload_bytes, payload_layout
from deltafold.errors import MismatchError, UsageError
from deltafold.restoring.load import load_state
from deltafold.running.record import read_record

QUERY = "model.layers.1.self_attn.q_proj.weight"


def codecs(archive: Path) -> dict[str, str]:
    return {row["name"]: row["codec"] for row in inspect(archive)["tensors"]}


def round_trip(pair: PairFiles, method: str = "lossless", **options: Any) -> Tensors:
    """Compress and restore; the restored tensors."""
    archive, out = pair.base.parent / "x.delta", pair.base.parent / "x.restored"
    compress(pair.base, pair.finetuned, archive, method, **options)
    restore(archive, pair.base, out)
    verify(archive, pair.base, pair.finetuned)
    return read_checkpoint(out)


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["impart", "lossless", "dare"])
def test_same_bytes_with_any_number_of_workers(
    pair: PairFiles, tmp_path: Path, method: str
) -> None:
    budget = {} if method == "lossless" else {"file_ratio": 8}
    found = []
    for workers in (1, 2, 4):
        archive, out = tmp_path / f"{workers}.delta", tmp_path / f"{workers}.restored"
        compress(pair.base, pair.finetuned, archive, method, workers=workers, **budget)
        restore(archive, pair.base, out, workers=workers, memory_bytes=1 << 20)
        found.append((tree_hashes(archive), tree_hashes(out)))
    assert found[0] == found[1] == found[2]


def test_the_seed_matters_only_to_random_methods(pair: PairFiles, tmp_path: Path) -> None:
    def hashes(method: str, seed: int) -> str:
        archive = tmp_path / f"{method}-{seed}.delta"
        compress(pair.base, pair.finetuned, archive, method, file_ratio=8, seed=seed)
        return tree_hashes(archive)["payload-00001-of-00001.safetensors"]

    assert hashes("dare", 0) != hashes("dare", 1)
    assert hashes("magnitude", 0) == hashes("magnitude", 1)


@pytest.mark.parametrize("shards", [1, 3])
def test_lossless_gives_the_same_files(tmp_path: Path, shards: int) -> None:
    pair = make_pair(tmp_path, shards=shards)
    round_trip(pair)
    restored, original = tree_hashes(tmp_path / "x.restored"), tree_hashes(pair.finetuned)
    index = "model.safetensors.index.json"
    restored.pop(index, None)  # written anew: the same shards and names
    original.pop(index, None)
    assert restored == original
    assert len([name for name in restored if name.endswith(".safetensors")]) == shards


def test_weight_files_of_any_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    weights = pair.finetuned / "model.safetensors"
    weights.rename(pair.finetuned / "my weights.safetensors")
    round_trip(pair)
    assert tree_hashes(tmp_path / "x.restored")["my weights.safetensors"]


def test_single_files_without_a_folder(pair: PairFiles, tmp_path: Path) -> None:
    files = [folder / "model.safetensors" for folder in (pair.base, pair.finetuned)]
    compress(*files, tmp_path / "x.delta", "lossless")
    restore(tmp_path / "x.delta", files[0], tmp_path / "x.restored")
    assert (
        tree_hashes(tmp_path / "x.restored")["model.safetensors"]
        == (tree_hashes(pair.finetuned)["model.safetensors"])
    )


def test_side_files_come_back(pair: PairFiles, archive: Path) -> None:
    with Archive(archive) as opened:
        stored = {entry.name: entry.stored for entry in opened.manifest.files}
    assert stored == {
        "chat_template.jinja": "zstd",
        "config.json": "zstd-base",
        "tokenizer.json": "base",
    }
    restore(archive, pair.base, archive.parent / "restored")
    original = tree_hashes(pair.finetuned)
    restored = tree_hashes(archive.parent / "restored")
    assert {name: restored[name] for name in stored} == {name: original[name] for name in stored}


# --- what becomes of each tensor ------------------------------------------------------------------


def test_lossy_methods_are_really_used(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    """The fixture's deltas are low-rank, so that no test of a method tests its fallback."""
    assert codecs(archive)[QUERY] == "impart"
    compress(pair.base, pair.finetuned, tmp_path / "lowrank.delta", "lowrank", file_ratio=8)
    assert codecs(tmp_path / "lowrank.delta")[QUERY] == "lowrank"
    found = codecs(archive)
    assert found["lm_head.weight"] == "skip"
    assert found["model.norm.weight"] in ("context", "lossless")
    assert found["model.layers.0.input_layernorm.weight"] == "skip"


def test_restored_is_nearer_than_the_base(pair: PairFiles, tmp_path: Path) -> None:
    archive = tmp_path / "lowrank.delta"
    compress(pair.base, pair.finetuned, archive, "lowrank", file_ratio=8)
    record = verify(archive, pair.base, pair.finetuned)
    assert 0 < record["relative_error"] < 0.6
    restore(archive, pair.base, tmp_path / "restored")
    restored = read_checkpoint(tmp_path / "restored")
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert same_bits({name: restored[name]}, {name: pair.tensors[name]})
    wrong = (restored[QUERY].float() - pair.tensors[QUERY].float()).norm()
    delta = pair.tensors[QUERY].float() - load_file(pair.base / "model.safetensors")[QUERY].float()
    assert wrong < 0.6 * delta.norm()


def test_all_equal(tmp_path: Path) -> None:
    def equal(base: Tensors, tuned: Tensors) -> None:
        tuned |= base

    pair = make_pair(tmp_path, edit=equal)
    assert same_bits(round_trip(pair, "impart", file_ratio=8), pair.tensors)
    assert set(codecs(tmp_path / "x.delta").values()) == {"skip"}
    assert not list((tmp_path / "x.delta").glob("payload*"))


def odd_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {
        "scalar": torch.tensor(1.5),
        "temperature": torch.tensor([2.5]),
        "none": torch.zeros(0),
        "no.rows": torch.zeros(0, 64),
        "no.columns": torch.zeros(64, 0, dtype=torch.bfloat16),
        "position_ids": torch.arange(40).reshape(1, 40),
        "mask": torch.tensor([[True, False], [False, True]]),
        "bytes": torch.arange(64, dtype=torch.uint8),
        "half.weight": torch.randn(32, 64, generator=generator).half(),
        "single.weight": torch.randn(32, 64, generator=generator),
        "double.weight": torch.randn(32, 64, generator=generator).double(),
        "cube.weight": torch.randn(3, 5, 7, generator=generator),
    }


@pytest.mark.parametrize("where", ["both", "changed", "finetuned"])
@pytest.mark.parametrize("method", ["lossless", "sparse-patch", "impart"])
def test_odd_tensors(tmp_path: Path, where: str, method: str) -> None:
    """Zero-size, scalar, integer and boolean tensors; equal, changed, or new in the fine-tune."""

    def add(base: Tensors, tuned: Tensors) -> None:
        tuned |= odd_tensors()
        if where != "finetuned":
            base |= odd_tensors()
        if where == "changed":
            for name, tensor in odd_tensors().items():
                flat = tensor.reshape(-1)
                flat[:1] = ~flat[:1] if tensor.dtype == torch.bool else flat[:1] + 1
                tuned[name] = flat.reshape(tensor.shape)

    pair = make_pair(tmp_path, edit=add)
    restored = round_trip(pair, method, **({"file_ratio": 4} if method == "impart" else {}))
    names = list(odd_tensors())
    assert same_bits({n: restored[n] for n in names}, {n: pair.tensors[n] for n in names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    pair = make_pair(tmp_path, dtype=dtype, tuned_dtype=tuned_dtype)
    assert same_bits(round_trip(pair), pair.tensors)
    shutil.rmtree(tmp_path / "x.delta")
    shutil.rmtree(tmp_path / "x.restored")
    lossy = round_trip(pair, "lowrank", file_ratio=8)
    assert {n: t.dtype for n, t in lossy.items()} == {n: t.dtype for n, t in pair.tensors.items()}


def test_tensors_on_one_side_only(tmp_path: Path) -> None:
    def sides(base: Tensors, tuned: Tensors) -> None:
        base["old.weight"] = torch.ones(32, 32)
        tuned["score.weight"] = torch.randn(2, 64)

    pair = make_pair(tmp_path, edit=sides)
    assert same_bits(round_trip(pair), pair.tensors)
    found = inspect(tmp_path / "x.delta")
    assert found["removed"] == ["old.weight"]
    row = next(row for row in found["tensors"] if row["name"] == "score.weight")
    assert row["why"] == "only in the fine-tune"


@pytest.mark.parametrize("rows", [520, 500])
@pytest.mark.parametrize("method", ["lossless", "impart"])
def test_vocabulary_grows_and_shrinks(tmp_path: Path, rows: int, method: str) -> None:
    def resize(base: Tensors, tuned: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            more = torch.randn(max(0, rows - 512), 64).bfloat16()
            tuned[name] = torch.cat([tuned[name][:rows], more])

    pair = make_pair(tmp_path, edit=resize)
    restored = round_trip(pair, method, **({"file_ratio": 6} if method == "impart" else {}))
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert same_bits({n: restored[n] for n in names}, {n: pair.tensors[n] for n in names})


@pytest.mark.parametrize("method", ["lossless", "impart"])
def test_a_tied_head_stored_twice_costs_once(tmp_path: Path, method: str) -> None:
    def tie(base: Tensors, tuned: Tensors) -> None:
        for side in (base, tuned):
            side["lm_head.weight"] = side["model.embed_tokens.weight"].clone()

    pair = make_pair(tmp_path, edit=tie)
    restored = round_trip(pair, method, **({"file_ratio": 6} if method == "impart" else {}))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert sorted(codecs(tmp_path / "x.delta")[name] for name in names)[-1] == "same-as"
    assert torch.equal(*(restored[name] for name in names))
    state = load_state(tmp_path / "x.delta", pair.base)
    assert same_bits(state, restored)


@pytest.mark.parametrize("method", ["lossless", "impart", "lowrank"])
def test_fused_experts(tmp_path: Path, method: str) -> None:
    """A stack of expert matrices is a piece a matrix; an expert that did not move costs nothing."""
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def fuse(base: Tensors, tuned: Tensors) -> None:
        generator = torch.Generator().manual_seed(3)
        base[name] = (0.05 * torch.randn(4, 64, 96, generator=generator)).bfloat16()
        moved = base[name].float()
        left, right = torch.randn(3, 64, 2, generator=generator), torch.randn(3, 2, 96)
        moved[[0, 1, 3]] += 0.01 * left @ right
        tuned[name] = moved.bfloat16()

    pair = make_pair(tmp_path, edit=fuse)
    restored = round_trip(pair, method, **({} if method == "lossless" else {"file_ratio": 6}))
    assert restored[name].shape == (4, 64, 96)
    assert torch.equal(restored[name][2], pair.tensors[name][2])
    found = codecs(tmp_path / "x.delta")[name]
    assert found.split("+")[0] == ("context" if method == "lossless" else method)
    assert "skip" in found


# --- verify, inspect, one tensor ------------------------------------------------------------------


def test_verify_says_how_much_it_checked(pair: PairFiles, archive: Path) -> None:
    alone = verify(archive)
    assert alone["tensors_checked"] == len(pair.tensors)
    assert alone["tensors_decoded"] == 0
    assert alone["relative_error"] is None
    with_base = verify(archive, pair.base)
    exact = [name for name, codec in codecs(archive).items() if codec != "impart"]
    assert with_base["tensors_decoded"] == len(pair.tensors)
    assert with_base["tensors_exact"] == len(exact)


def test_verify_against_the_wrong_finetune(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", seed=4)
    refused(
        MismatchError,
        lambda: verify(archive, pair.base, other.finetuned),
        str(other.finetuned),
        "not the fine-tune",
    )
    fewer = write_checkpoint(tmp_path / "fewer", {QUERY: pair.tensors[QUERY]})
    refused(MismatchError, lambda: verify(archive, pair.base, fewer), "not the fine-tune", "BF16")
    refused(MismatchError, lambda: verify(archive, against=pair.finetuned), "--base")
    refused(MismatchError, lambda: verify(archive, pair.finetuned), "is not the base")


def test_verify_measures_what_restore_gives(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    restore(archive, pair.base, tmp_path / "restored")
    restored, base = read_checkpoint(tmp_path / "restored"), read_checkpoint(pair.base)
    wrong = sum(
        (t.float() - restored[n].float()).square().sum().item() for n, t in pair.tensors.items()
    )
    total = sum(
        (t.float() - base[n].float()).square().sum().item() for n, t in pair.tensors.items()
    )
    found = verify(archive, pair.base, pair.finetuned)["relative_error"]
    assert found == pytest.approx((wrong / total) ** 0.5, rel=1e-3)


def test_tensors_alone(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    restore(archive, pair.base, tmp_path / "whole")
    whole = read_checkpoint(tmp_path / "whole")
    restore(archive, pair.base, tmp_path / "part", tensors=[QUERY, "model.norm.weight", QUERY])
    part = read_checkpoint(tmp_path / "part")
    assert same_bits(part, {name: whole[name] for name in (QUERY, "model.norm.weight")})
    assert sorted(tree_hashes(tmp_path / "part")) == ["model.safetensors"]


def test_a_tensor_that_is_not_there(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    refused(
        UsageError,
        lambda: restore(archive, pair.base, tmp_path / "x", tensors=["model.norm.weigth"]),
        "'model.norm.weigth'",
        "did you mean 'model.norm.weight'",
    )
    assert not (tmp_path / "x").exists()


def test_shards_of_another_size(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    restore(archive, pair.base, tmp_path / "whole")
    restore(archive, pair.base, tmp_path / "shards", shard_bytes=60_000)
    assert same_bits(read_checkpoint(tmp_path / "shards"), read_checkpoint(tmp_path / "whole"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()


def test_load_state_is_what_restore_writes(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    restore(archive, pair.base, tmp_path / "restored")
    assert same_bits(load_state(archive, pair.base), read_checkpoint(tmp_path / "restored"))


def test_inspect_counts_true_bytes(archive: Path) -> None:
    found = inspect(archive)
    on_disk = sum(file.stat().st_size for file in archive.rglob("*") if file.is_file())
    totals = found["totals"]
    assert totals["archive_bytes"] == on_disk
    assert totals["file_ratio"] == pytest.approx(totals["checkpoint_bytes"] / on_disk)
    assert totals["payload_bytes"] + totals["manifest_bytes"] + totals["files_bytes"] == on_disk
    assert totals["file_ratio"] == pytest.approx(8, rel=0.01)


def test_records_lie_beside(pair: PairFiles, tmp_path: Path) -> None:
    given_back = compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless")
    assert read_record(tmp_path / "x.delta") == given_back
    assert "delta.json" in tree_hashes(tmp_path / "x.delta")
    assert not [name for name in tree_hashes(tmp_path / "x.delta") if "record" in name]


# --- the format -----------------------------------------------------------------------------------


def test_manifest_survives_a_round_trip(archive: Path, tmp_path: Path) -> None:
    manifest = read_manifest(archive)
    (tmp_path / "delta.json").write_text(manifest.to_text())
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / "delta.json").read_bytes() == (archive / "delta.json").read_bytes()


def test_payload_is_plain_safetensors(archive: Path) -> None:
    with Archive(archive) as opened:
        expected = {
            tensor.part_name(piece, part): value
            for tensor in opened.manifest.tensors
            for piece in tensor.pieces
            for part, value in opened.parts(tensor, piece).items()
        }
    assert same_bits(load_file(archive / "payload-00001-of-00001.safetensors"), expected)


def test_only_what_is_listed_is_in_the_folder(archive: Path) -> None:
    assert sorted(tree_hashes(archive)) == [
        "delta.json",
        "files/chat_template.jinja.zst",
        "files/config.json.zst",
        "payload-00001-of-00001.safetensors",
    ]


@given(
    parts=st.lists(st.tuples(st.sampled_from(["U8", "F16", "F32"]), st.integers(0, 40)), max_size=9)
)
@settings(max_examples=30, deadline=None)
def test_payload_bytes_are_known_beforehand(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, int]]
) -> None:
    from deltafold.archive.writer import write_payload
    from deltafold.checkpoint import DTYPES

    folder = tmp_path_factory.mktemp("payload")
    specs = [(f"t{k}::x", dtype, (size,)) for k, (dtype, size) in enumerate(parts)]
    tensors = {name: torch.zeros(*shape, dtype=DTYPES[dtype]) for name, dtype, shape in specs}
    written = write_payload(folder, specs, tensors.__getitem__)
    assert sum(entry.n_bytes for entry in written) == payload_bytes(specs)
    assert sum(file.stat().st_size for file in folder.iterdir()) == payload_bytes(specs)


def test_payload_is_split_by_size() -> None:
    specs = [(f"t{k}::x", "U8", (100,)) for k in range(5)]
    layout = payload_layout(specs, 250)
    assert [file for file, _ in layout] == [
        f"payload-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)
    ]
    assert [spec for _, group in layout for spec in group] == specs
    assert payload_layout([]) == []


def test_metadata_of_the_weights_is_kept(pair: PairFiles, tmp_path: Path) -> None:
    file = pair.finetuned / "model.safetensors"
    save_file(pair.tensors, file, metadata={"format": "pt", "trained": "yes"})
    round_trip(pair)
    restored = tmp_path / "x.restored" / "model.safetensors"
    assert restored.read_bytes() == file.read_bytes()
