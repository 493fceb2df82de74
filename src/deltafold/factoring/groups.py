"""Groups of blocks whose inputs are alike, by the Gram matrices of a calibration."""

from __future__ import annotations

import torch

from deltafold.calibration import Calibration
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.basis import alike, likeness
from deltafold.factoring.methods.presets import SHARED_ROLES


def alike_groups(job: FactorJob, calibration: Calibration, size: int) -> FactorJob:
    """The job with groups of `size` blocks with like inputs, for each kind of layer that shares.

    Grams are read in pairs. Blocks whose inputs are not known are like no other.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for local in dict.fromkeys(matrix.local for matrix in job.matrices.values()):
        same = [matrix for matrix in job.matrices.values() if matrix.local == local]
        blocks = [matrix.block for matrix in same]
        if same[0].role not in SHARED_ROLES or same[0].stacked:
            found[local] = [(block,) for block in blocks]
            continue
        cosines = torch.zeros(len(same), len(same))
        for row, one in enumerate(same):
            first = calibration.moments(one.tensors[0][0])
            for column, two in enumerate(same[:row]):
                second = calibration.moments(two.tensors[0][0])
                if first is not None and second is not None:
                    near = likeness(first.second, second.second)
                    cosines[row, column] = cosines[column, row] = near
        found[local] = alike(blocks, cosines, size)
    return job.regrouped(found)
