"""Text run through a model block by block: what it says of layers, predictions and gradients."""

from deltafold.calibration.backward import backward
from deltafold.calibration.batches import Batch, Sample, make_batches
from deltafold.calibration.divergence import Divergence, Judge
from deltafold.calibration.gather import Sampling, gather_samples
from deltafold.calibration.moments import Calibration, calibrate
from deltafold.calibration.stream import StreamedModel

__all__ = [
    "Batch",
    "Calibration",
    "Divergence",
    "Judge",
    "Sample",
    "Sampling",
    "StreamedModel",
    "backward",
    "calibrate",
    "gather_samples",
    "make_batches",
]
