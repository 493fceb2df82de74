"""Values at the ends of their dtypes, constants that are infinite, and nothing to approximate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import read_checkpoint, same_bits
from safetensors.torch import save_file

from deltafold import compress, merge, restore, verify
from deltafold.archive import read_manifest
from deltafold.checkpoint import Checkpoint
from deltafold.codecs import get, names
from deltafold.coding.sums import rounded_sum, squared, squared_distance
from deltafold.errors import NonFiniteError
from deltafold.merging.recipe import Model, Recipe

LOSSY = [name for name in names() if get(name).lossy and get(name).method]
INFINITE = float("inf")
Tensors = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(folder: Path, base: Tensors, tuned: Tensors) -> tuple[Path, Path]:
    """Two folders that hold these tensors, and one ordinary matrix."""
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        weight = random(64, 64) + (name == "tuned") * 0.01 * random(64, 64, seed=1)
        save_file(
            {"up.weight": weight.bfloat16(), **{n: x.contiguous() for n, x in tensors.items()}},
            folder / name / "model.safetensors",
            {"format": "pt"},
        )
    return folder / "base", folder / "tuned"


def there_and_back(
    base: Path, tuned: Path, method: str, *, ratio: float | None = None
) -> tuple[Tensors, dict[str, object]]:
    archive, out = base.parent / f"{method}.delta", base.parent / f"{method}-restored"
    asked = {"file_ratio": ratio, "calibration": "none"} if ratio else {}
    record = compress(base, tuned, archive, method, **asked)
    restore(archive, base, out)
    verify(archive, base, tuned)
    json.dumps(record, allow_nan=False)
    return read_checkpoint(out), {t.name: t for t in read_manifest(archive).tensors}


# Overflow


@pytest.mark.parametrize("method", LOSSY)
def test_large_fp16_values_do_not_become_infinite(method: str, tmp_path: Path) -> None:
    large = random(64, 64, seed=3).sign() * 6e4
    base, tuned = pair_of(
        tmp_path,
        {"down.weight": large.half()},
        {"down.weight": (large + 4e3 * random(64, 64, seed=4).clamp(-1.3, 1.3)).half()},
    )
    assert read_checkpoint(tuned)["down.weight"].isfinite().all()
    restored, _ = there_and_back(base, tuned, method, ratio=2)
    assert restored["down.weight"].isfinite().all()


def test_a_sum_ends_at_the_largest_number() -> None:
    base = torch.tensor([6e4, -6e4, 6e4, INFINITE, -INFINITE, float("nan")])
    change = torch.tensor([1e4, -1e4, 0.0, 5.0, 5.0, 0.0])
    found = rounded_sum(base, change, torch.float16)
    assert found[:5].tolist() == [65504, -65504, 6e4, INFINITE, -INFINITE] and found[5].isnan()
    huge = torch.tensor([3e38])
    assert float(rounded_sum(huge, huge.clone(), torch.bfloat16)) == torch.finfo(torch.bfloat16).max
    assert float(rounded_sum(huge, huge.clone(), torch.float32)) == torch.finfo(torch.float32).max


LOW = torch.finfo(torch.float32).min
HUGE = {
    "equal masks": (torch.full((64, 64), LOW).triu(1), torch.full((64, 64), LOW).triu(1)),
    "other masks": (torch.full((64, 64), LOW).triu(1), torch.full((64, 64), LOW).triu(2)),
    "another sign": (torch.full((64, 64), 3e38), torch.full((64, 64), -3e38)),
    "1e30": (random(64, 64) * 1e30, random(64, 64) * 2e30),
    "fp64": (random(64, 64).double() * 1e300, random(64, 64).double() * -2e300),
}


@pytest.mark.parametrize("method", ["lossless", "lowrank", "auto"])
@pytest.mark.parametrize("case", HUGE)
def test_huge_values_are_stored_exactly(case: str, method: str, tmp_path: Path) -> None:
    a, b = HUGE[case]
    base, tuned = pair_of(tmp_path, {"mask": a}, {"mask": b})
    ratio = None if method == "lossless" else 1.1
    restored, entries = there_and_back(base, tuned, method, ratio=ratio)
    assert same_bits({"": restored["mask"]}, {"": b})
    assert not entries["mask"].lossy


def test_sums_of_squares_do_not_overflow() -> None:
    huge = torch.full((10,), 3e38)
    assert math.isclose(squared(huge), 10 * float(huge[0]) ** 2)
    assert math.isclose(squared_distance(huge, -huge), 40 * float(huge[0]) ** 2)
    assert squared(torch.tensor([INFINITE, float("nan"), 2.0])) == 4.0
    assert squared(torch.full((3,), 1e300, dtype=torch.float64)) == 1e300


# Constants that are no numbers


def constants(dtype: torch.dtype) -> Tensors:
    rows = random(160, 64, seed=5).to(dtype)
    rows[150:] = float("nan")
    return {
        "attn.masked_bias": torch.tensor(-INFINITE).to(dtype),
        "attn.mask": torch.full((1, 1, 32, 32), -INFINITE).triu(1).to(dtype),
        "wte.weight": rows,
        "matrix.weight": torch.where(random(64, 64) > 2, INFINITE, random(64, 64)).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["lossless", "sparse-patch", "lowrank", "auto"])
def test_constants_of_both_sides_are_taken(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    held = constants(dtype)
    changed = {n: x.clone() for n, x in held.items()}
    changed["wte.weight"][:150] += 0.01 * random(150, 64, seed=6).to(dtype)
    changed["matrix.weight"] += 0.01
    base, tuned = pair_of(tmp_path, held, changed)
    ratio = None if method in ("lossless", "sparse-patch") else 1.2
    restored, entries = there_and_back(base, tuned, method, ratio=ratio)
    assert same_bits({n: restored[n] for n in changed}, changed)
    assert not any(entries[name].lossy for name in changed)


def test_a_constant_that_a_narrower_dtype_makes_infinite_is_taken(tmp_path: Path) -> None:
    base, tuned = pair_of(
        tmp_path,
        {"attn.masked_bias": torch.tensor(-1e9)},
        {"attn.masked_bias": torch.tensor(-1e9).half()},
    )
    restored, _ = there_and_back(base, tuned, "lowrank", ratio=1.5)
    assert float(restored["attn.masked_bias"]) == -INFINITE


@pytest.mark.parametrize("value", [INFINITE, -INFINITE, float("nan")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_what_one_side_has_is_refused_where_methods_approximate(
    side: str, value: float, tmp_path: Path
) -> None:
    sound, broken = {"down.weight": random(64, 64)}, {"down.weight": random(64, 64)}
    broken["down.weight"][3, 4] = value
    given = (broken, sound) if side == "base" else (sound, broken)
    base, tuned = pair_of(tmp_path, *given)
    with pytest.raises(NonFiniteError, match=rf"down\.weight of \S*{side} .*lossless"):
        compress(base, tuned, tmp_path / "a.delta", "lowrank", file_ratio=2)
    restored, _ = there_and_back(base, tuned, "lossless")
    assert same_bits({"": restored["down.weight"]}, {"": given[1]["down.weight"]})


def test_merge_keeps_constants(tmp_path: Path) -> None:
    held = constants(torch.float16)
    base, tuned = pair_of(tmp_path, held, held)
    merge(base, Recipe((Model(str(tuned)), Model(str(tuned))), "average"), tmp_path / "merged")
    found = read_checkpoint(tmp_path / "merged")
    for name, value in held.items():
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


# Nothing to approximate


@pytest.mark.parametrize("method", ["auto", "lowrank", "dare-qt"])
def test_only_norms_changed(method: str, tmp_path: Path, deltafold) -> None:
    base, tuned = pair_of(tmp_path, {"norm.weight": random(64)}, {"norm.weight": random(64) + 0.1})
    weights = read_checkpoint(base) | {"norm.weight": random(64) + 0.1}
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    archive = tmp_path / "a.delta"
    asked = ("--nominal-ratio", 16, "--calibration", "none")
    done = deltafold("compress", base, tuned, "-o", archive, "-m", method, *asked)
    assert done.returncode == 0 and "nothing to approximate" in done.stdout, done.stderr
    for command in (
        ("inspect", archive),
        ("report", f"{archive}.record.json"),
        ("report", f"{archive}.record.json", "--page", tmp_path / "page.html"),
        ("verify", archive, "--base", base, "--against", tuned),
    ):
        done = deltafold(*command)
        assert done.returncode == 0, done.stderr


# Order


def test_empty_tensors_keep_their_place(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(4), "c": torch.zeros(0), "a": torch.zeros(2, 0)}, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    (tmp_path / "x").rename(tmp_path / "x.safetensors")
    with Checkpoint(tmp_path / "x.safetensors") as found:
        assert list(found.tensors) == [name for name in header if name != "__metadata__"]
