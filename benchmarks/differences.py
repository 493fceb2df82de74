"""Two merged folders of the same models, weight by weight."""

from __future__ import annotations

from pathlib import Path

import torch

from deltafold.checkpoint import open_checkpoint
from deltafold.running.record import Record


def compare(models: list[Path], theirs: Path, ours: Path, random: bool) -> Record:
    """What differs between two merged folders, over the tensors that both have.

    Without chance: share of entries equal in every bit, and within one rounding step of the largest
    of the entries that are merged; the largest difference; the norm of all differences over that of
    mergekit's merged delta.
    With chance: norm of the merged deltas, and share of entries that they change.
    """
    left, right, *merged = (open_checkpoint(path) for path in (theirs, ours, *models))
    sums = _Sums()
    for name in left.tensors:
        if name in right.tensors:
            sums.add(left.tensor(name), right.tensor(name), [each.tensor(name) for each in merged])
    lacking = sorted(left.tensors.keys() ^ right.tensors.keys())
    shared: Record = {"entries": sums.entries, "only_one_has": lacking}
    if random:
        return shared | {
            "mergekit_norm": sums.theirs**0.5,
            "deltafold_norm": sums.ours**0.5,
            "mergekit_density": sums.theirs_moved / sums.entries,
            "deltafold_density": sums.ours_moved / sums.entries,
        }
    return shared | {
        "equal": sums.equal / sums.entries,
        "within_rounding": sums.near / sums.entries,
        "max_difference": sums.largest,
        "relative_difference": (sums.apart / sums.theirs) ** 0.5,
    }


class _Sums:
    """Sums over tensors."""

    def __init__(self) -> None:
        self.entries = self.equal = self.near = self.theirs_moved = self.ours_moved = 0
        self.theirs = self.ours = self.apart = self.largest = 0.0

    def add(self, theirs: torch.Tensor, ours: torch.Tensor, merged: list[torch.Tensor]) -> None:
        self.entries += ours.numel()
        self.equal += int((theirs == ours).sum())
        largest = torch.stack([each.abs().double() for each in (theirs, ours, *merged)]).amax(0)
        step, base = torch.finfo(ours.dtype).eps * largest, merged[0].double()
        a, b = theirs.double() - base, ours.double() - base
        self.near += int(((a - b).abs() <= step).sum())
        self.theirs_moved, self.ours_moved = (
            moved + int((delta != 0).sum())
            for moved, delta in ((self.theirs_moved, a), (self.ours_moved, b))
        )
        self.theirs += float(a.square().sum())
        self.ours += float(b.square().sum())
        self.apart += float((a - b).square().sum())
        self.largest = max(self.largest, float((a - b).abs().max()))
