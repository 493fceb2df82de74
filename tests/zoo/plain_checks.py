"""The same of models that transformers knows nothing of: tensors alone are looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from checkpoints import read_checkpoint, tree_hashes
from checks import RATIO, means_of
from diffusion import write_diffusion

import deltafold


class PlainSpecimen:
    """A diffusion model, or a pipeline of several: a base and two fine-tunes."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    @cached_property
    def folders(self) -> list[Path]:
        """The base and the fine-tunes."""
        return write_diffusion(self.name, self.folder, [1, 2])

    @cached_property
    def archive(self) -> Path:
        base, tuned, _ = self.folders
        deltafold.compress(base, tuned, self.folder / "exact.delta", "lossless")
        return self.folder / "exact.delta"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors under a folder, those of its parts too, by part and name."""
    parts = sorted({file.parent for file in folder.rglob("*.safetensors")})
    return {
        f"{part.relative_to(folder)}/{name}": tensor
        for part in parts
        for name, tensor in read_checkpoint(part).items()
    }


def exact(it: PlainSpecimen) -> None:
    """Every file of every part back, every bit."""
    base, tuned, _ = it.folders
    deltafold.verify(it.archive, base, tuned)
    deltafold.restore(it.archive, base, it.folder / "restored")
    assert tree_hashes(it.folder / "restored") == tree_hashes(tuned)


def auto(it: PlainSpecimen) -> None:
    """Little over half of the bytes; every tensor finite, all together nearer than the base."""
    base, tuned, _ = it.folders
    archive, out = it.folder / "auto.delta", it.folder / "near"
    deltafold.compress(base, tuned, archive, file_ratio=RATIO)
    deltafold.verify(archive, base, tuned)
    deltafold.restore(archive, base, out)
    found, wanted, before = (tensors(each) for each in (out, tuned, base))
    assert set(found) == set(wanted)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert apart(found, wanted) < 0.5 * apart(before, wanted)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The root of the sum of all squared differences."""
    return sum(float((one[n].float() - other[n].float()).square().sum()) for n in other) ** 0.5


def merge(it: PlainSpecimen) -> None:
    """The mean of two fine-tunes, in every tensor of every part."""
    base, one, two = it.folders
    out = it.folder / "merged"
    deltafold.merge([one, two], out, "average", base=base)
    assert set(tensors(out)) == set(tensors(base))
    for part in sorted({file.parent.relative_to(base) for file in base.rglob("*.safetensors")}):
        means_of(out / part, base / part, one / part, two / part)


def load(it: PlainSpecimen) -> None:
    deltafold.load(it.archive, it.folders[0])


def fold(it: PlainSpecimen) -> None:
    deltafold.fold(it.folders[1], it.folder / "folded", "random", blocks=1, calibration="none")


def factor(it: PlainSpecimen) -> None:
    out = it.folder / "factored"
    deltafold.factor(it.folders[1], out, "svd", parameters=0.9, calibration="none")


def share(it: PlainSpecimen) -> None:
    deltafold.share(it.folders[1], it.folder / "shared", shared=1, rank=1)


def export(it: PlainSpecimen) -> None:
    deltafold.export(it.archive, it.folder / "adapter", base=it.folders[0], rank=64)


VERBS: dict[str, Callable[[PlainSpecimen], None]] = {
    "exact": exact, "auto": auto, "load": load, "fold": fold, "factor": factor, "share": share,
    "merge": merge, "export": export,
}  # fmt: skip
"""Those without a value to compare are to be refused; `run.py` has no way to count them as right."""
REFUSED = ("load", "fold", "factor", "share", "export")
