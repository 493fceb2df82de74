"""`compress` as a whole: budgets met on disk, the policy for each kind of tensor, determinism."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_pair, write_checkpoint

import deltafold
from deltafold.archive import Archive
from deltafold.codecs import delta_codec, get, names
from deltafold.errors import BudgetError, UsageError

LOSSY = [name for name in names() if get(name).lossy]


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair large enough (2.6 MB) that manifest and rounding are small beside the values."""
    folder = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for block in range(2):
        prefix = f"model.layers.{block}."
        shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (64, 256)}
        shapes |= {"mlp.up_proj": (704, 256), "mlp.down_proj": (256, 704)}
        for name, (o, i) in shapes.items():
            r = min(o, i)
            left, right = (
                torch.randn(o, r, generator=generator),
                torch.randn(r, i, generator=generator),
            )
            delta = (left * torch.arange(1, r + 1).float() ** -0.8) @ right * 1e-3
            base[f"{prefix}{name}.weight"] = 0.05 * torch.randn(o, i, generator=generator)
            tuned[f"{prefix}{name}.weight"] = base[f"{prefix}{name}.weight"] + delta
        base[f"{prefix}input_layernorm.weight"] = torch.ones(256)
        tuned[f"{prefix}input_layernorm.weight"] = 1 + 0.01 * torch.randn(256, generator=generator)
    config = {"hidden_size": 256}
    as_bf16 = [{name: t.bfloat16() for name, t in part.items()} for part in (base, tuned)]
    return (
        write_checkpoint(folder / "base", as_bf16[0], config=config),
        write_checkpoint(folder / "tuned", as_bf16[1], config=config),
    )


def disk_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def has_no_use_for_more(record: dict[str, Any], method: str) -> bool:
    """Whether every approximated matrix keeps all that the method can keep: `bitdelta`'s signs."""
    codec = delta_codec(method)
    lossy = [row for row in record["tensors"] if row["relative_error"] is not None]
    most = [codec.settings_for(tuple(row["shape"]), 1.0) for row in lossy]
    return bool(lossy) and all(
        row["bytes"] == codec.part_bytes(tuple(row["shape"]), settings)
        for row, settings in zip(lossy, most, strict=True)
    )


@pytest.mark.parametrize("method", LOSSY)
@pytest.mark.parametrize("ratio", [8, 24])
def test_file_ratio_is_met_on_disk(wide_pair, tmp_path, method, ratio):
    base, tuned = wide_pair
    record = deltafold.compress(base, tuned, tmp_path / "a.delta", method, file_ratio=ratio)
    measured = disk_bytes(tuned) / disk_bytes(tmp_path / "a.delta")
    assert record["budget"]["got"] == pytest.approx(measured)
    assert measured >= 0.99 * ratio
    assert measured <= 1.01 * ratio or has_no_use_for_more(record, method)


@pytest.mark.parametrize("method", LOSSY)
def test_nominal_ratio_is_met(wide_pair, tmp_path, method):
    record = deltafold.compress(*wide_pair, tmp_path / "a.delta", method, nominal_ratio=20)
    assert record["totals"]["nominal_ratio"] == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("method", LOSSY)
def test_bytes_are_met(wide_pair, tmp_path, method):
    record = deltafold.compress(*wide_pair, tmp_path / "a.delta", method, n_bytes=150_000)
    found = disk_bytes(tmp_path / "a.delta")
    assert found <= 150_000
    assert found >= 0.99 * 150_000 or has_no_use_for_more(record, method)


def test_impossible_budget_names_the_smallest_possible_which_then_works(wide_pair, tmp_path):
    with pytest.raises(BudgetError, match="smallest archive") as refused:
        deltafold.compress(*wide_pair, tmp_path / "a.delta", "lowrank", file_ratio=100_000)
    smallest = int(str(refused.value).partition("takes about ")[2].split()[0].replace(",", ""))
    assert not (tmp_path / "a.delta").exists()
    record = deltafold.compress(*wide_pair, tmp_path / "a.delta", "lowrank", n_bytes=smallest)
    assert record["totals"]["archive_bytes"] <= 1.01 * smallest


def test_exact_methods_take_no_budget(wide_pair, tmp_path):
    with pytest.raises(UsageError, match="exact"):
        deltafold.compress(*wide_pair, tmp_path / "a.delta", "lossless", file_ratio=2)
    with pytest.raises(UsageError, match="cannot be asked for"):
        deltafold.compress(*wide_pair, tmp_path / "a.delta", "rows")


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("method", names())
def test_same_bytes_with_any_number_of_workers(wide_pair, tmp_path, method):
    if not get(method).method:
        pytest.skip("chosen by itself, not asked for")
    budget = {"file_ratio": 16} if get(method).lossy else {}
    for workers in (1, 2, 4):
        out = tmp_path / f"{workers}.delta"
        deltafold.compress(*wide_pair, out, method, workers=workers, **budget)
    assert (
        hashes(tmp_path / "1.delta") == hashes(tmp_path / "2.delta") == hashes(tmp_path / "4.delta")
    )


@pytest.mark.parametrize("method", ["lowrank", "svd-quant", "impart"])
def test_budgets_are_met_down_to_the_smallest_archive(wide_pair, tmp_path, method):
    """Where ranks are whole numbers, what is asked lies between two of them."""
    with pytest.raises(BudgetError, match="takes about") as told:
        deltafold.compress(*wide_pair, tmp_path / "no.delta", method, n_bytes=4000)
    smallest = int(re.search(r"about ([\d,]+) bytes", str(told.value))[1].replace(",", ""))
    for number, n_bytes in enumerate(smallest + step for step in (0, 300, 900, 2500, 9000)):
        out = tmp_path / f"{number}.delta"
        deltafold.compress(*wide_pair, out, method, n_bytes=n_bytes)
        assert disk_bytes(out) <= n_bytes + 64, "digits of error figures apart"


def test_memory_allowance_changes_no_byte(wide_pair, tmp_path):
    for number, memory in enumerate((1, 1 << 30)):
        deltafold.compress(*wide_pair, tmp_path / f"{number}.delta", memory_bytes=memory)
    assert hashes(tmp_path / "0.delta") == hashes(tmp_path / "1.delta")


def test_seed_changes_positions_and_nothing_else(wide_pair, tmp_path):
    sizes = set()
    for seed in (0, 1):
        out = tmp_path / f"{seed}.delta"
        sizes.add(deltafold.compress(*wide_pair, out, "dare", seed=seed)["totals"]["payload_bytes"])
    assert hashes(tmp_path / "0.delta") != hashes(tmp_path / "1.delta")
    assert len(sizes) == 1


def codecs_of(archive: Path) -> dict[str, str]:
    return {row["name"]: row["codec"] for row in deltafold.inspect(archive)["tensors"]}


def test_policy_for_each_kind_of_tensor(tmp_path):
    pair = make_pair(tmp_path / "pair")
    deltafold.compress(pair.base, pair.finetuned, tmp_path / "a.delta", "impart", file_ratio=6)
    found = codecs_of(tmp_path / "a.delta")
    assert found["lm_head.weight"] == "skip", "equal tensors cost nothing"
    assert found["model.layers.0.self_attn.k_proj.weight"] == "skip"
    assert found["model.norm.weight"] in ("context", "lossless"), "norms are exact"
    few = ("rows", "lossless", "context")
    assert found["model.embed_tokens.weight"] in few, "few changed rows are exact"
    assert found["model.layers.1.mlp.up_proj.weight"] == "impart"


def flat_pair(tmp_path: Path) -> tuple[Path, Path]:
    def edit(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            noise = 1e-3 * torch.randn(base[name].shape, generator=generator)
            tuned[name] = (base[name].float() + noise).to(base[name].dtype)
        name = "model.layers.0.mlp.down_proj.weight"
        changed = torch.rand(base[name].shape, generator=generator) < 0.05
        tuned[name] = torch.where(changed, base[name] * 2, base[name])

    pair = make_pair(tmp_path / "pair", edit=edit)
    return pair.base, pair.finetuned


@pytest.mark.parametrize("method", ["impart", "lowrank"])
def test_lowrank_codecs_are_not_forced_on_what_does_not_suit_them(tmp_path, method):
    base, tuned = flat_pair(tmp_path)
    deltafold.compress(base, tuned, tmp_path / "a.delta", method, file_ratio=8)
    found = codecs_of(tmp_path / "a.delta")
    assert found["model.layers.0.mlp.up_proj.weight"] == "dare", "noise has no low-rank part"
    assert found["model.layers.0.mlp.down_proj.weight"] in (
        "context",
        "sparse-patch",
        "magnitude",
    )
    assert found["model.layers.0.mlp.gate_proj.weight"] == method
    why = {t["name"]: t["why"] for t in deltafold.inspect(tmp_path / "a.delta")["tensors"]}
    assert "flat spectrum" in why["model.layers.0.mlp.up_proj.weight"]
    forced = deltafold.compress(
        base, tuned, tmp_path / "b.delta", method, file_ratio=8, fallback=False
    )
    lossy = {row["codec"] for row in forced["tensors"] if row["relative_error"] is not None}
    assert lossy == {method}


@pytest.mark.parametrize("budget", [{"file_ratio": 4}, {"nominal_ratio": 4}])
def test_all_matrices_sparse_and_exact(tmp_path, budget):
    """Nothing is left for the lossy method to do."""

    def edit(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in base.items():
            changed = torch.rand(tensor.shape, generator=generator) < 0.01
            tuned[name] = torch.where(changed, tensor + tensor, tensor)

    pair = make_pair(tmp_path / "pair", edit=edit)
    record = deltafold.compress(pair.base, pair.finetuned, tmp_path / "a.delta", **budget)
    assert all(row["relative_error"] is None for row in record["tensors"])
    verified = deltafold.verify(tmp_path / "a.delta", pair.base, pair.finetuned)
    assert verified["relative_error"] == 0.0


def test_plan_refuses_what_compress_refuses(wide_pair):
    with pytest.raises(UsageError, match="cannot be asked for"):
        deltafold.plan(*wide_pair, "rows")
    with pytest.raises(UsageError, match="exact"):
        deltafold.plan(*wide_pair, "lossless", file_ratio=3)


def test_lossless_restores_the_same_files(tmp_path):
    pair = make_pair(tmp_path / "pair", shards=3)
    deltafold.compress(pair.base, pair.finetuned, tmp_path / "a.delta", "lossless")
    deltafold.restore(tmp_path / "a.delta", pair.base, tmp_path / "restored")
    for file in pair.finetuned.glob("*.safetensors"):
        assert (tmp_path / "restored" / file.name).read_bytes() == file.read_bytes()


def test_restored_weights_are_base_plus_decoded_delta_rounded_once(wide_pair, tmp_path):
    base, tuned = wide_pair
    deltafold.compress(base, tuned, tmp_path / "a.delta", "lowrank", file_ratio=8)
    deltafold.restore(tmp_path / "a.delta", base, tmp_path / "restored")
    from safetensors.torch import load_file

    restored = load_file(tmp_path / "restored" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    with Archive(tmp_path / "a.delta") as archive:
        tensor = archive.by_name[name]
        parts = archive.parts(tensor, tensor.pieces[0])
    delta = ((parts["u"].double() * parts["s"].double()[:, None]).T @ parts["v"].double()).float()
    assert torch.equal(restored[name], (before[name].float() + delta).bfloat16())


def test_record_says_what_was_done(wide_pair, tmp_path):
    record = deltafold.compress(*wide_pair, tmp_path / "a.delta", "impart", file_ratio=16)
    on_disk = json.loads((tmp_path / "a.delta.record.json").read_text())
    assert on_disk == json.loads(json.dumps(record))
    assert sum(row["bytes"] for row in record["tensors"]) < record["totals"]["payload_bytes"]
    assert record["totals"]["archive_bytes"] == disk_bytes(tmp_path / "a.delta")
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 10**7
    lossy = [row for row in record["tensors"] if row["relative_error"] is not None]
    assert lossy and all(row["spectrum"] and row["delta_norm"] > 0 for row in lossy)
    verified = deltafold.verify(tmp_path / "a.delta", *wide_pair)
    total = sum((r["relative_error"] * r["delta_norm"]) ** 2 for r in lossy) ** 0.5
    norm = sum(r["delta_norm"] ** 2 for r in record["tensors"]) ** 0.5
    assert verified["relative_error"] == pytest.approx(total / norm, rel=0.02)


def test_a_record_that_cannot_be_written_is_refused_before_work(wide_pair, tmp_path):
    with pytest.raises(UsageError, match="record cannot go to"):
        deltafold.compress(*wide_pair, tmp_path / "a.delta", record=tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="record cannot go to"):
        deltafold.compress(*wide_pair, tmp_path / "a.delta", record=tmp_path / "file" / "r.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_of_the_run_stays_behind(wide_pair, tmp_path):
    deltafold.compress(*wide_pair, tmp_path / "a.delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.delta", "a.delta.record.json"]


def test_auto_settings_are_chosen_and_reported(wide_pair, tmp_path):
    record = deltafold.compress(
        *wide_pair, tmp_path / "a.delta", "impart", file_ratio=16, beta="auto", c=1.0
    )
    assert [tried["settings"]["beta"] for tried in record["tried"]] == [0.6, 0.7, 0.8]
    assert {tried["criterion"] for tried in record["tried"]} == {"relative error of the delta"}
    best = min(record["tried"], key=lambda tried: tried["value"])
    assert [tried for tried in record["tried"] if tried.get("kept")] == [best]
    assert record["settings"]["beta"] == best["settings"]["beta"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.delta", "a.delta.record.json"]
    with pytest.raises(UsageError, match="cannot be auto"):
        deltafold.compress(*wide_pair, tmp_path / "b.delta", "dare", beta="auto")
    with pytest.raises(BudgetError):
        deltafold.compress(
            *wide_pair, tmp_path / "b.delta", "impart", file_ratio=10**6, beta="auto"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.delta", "a.delta.record.json"]


def test_plan_reads_headers_only_and_is_near_what_comes_out(wide_pair, tmp_path, monkeypatch):
    from deltafold.checkpoint import Checkpoint

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "rows", lambda *_: pytest.fail("a weight was read"))
        planned = deltafold.plan(*wide_pair, "impart", file_ratio=16)
    record = deltafold.compress(*wide_pair, tmp_path / "a.delta", "impart", file_ratio=16)
    assert planned["expected_bytes"] == pytest.approx(record["totals"]["archive_bytes"], rel=0.05)
    assert {row["role"] for row in planned["roles"]} == {"attention", "mlp", "norm"}
