"""A checkpoint as the outside world has it: header-only view, lazy rows, streaming writer."""

from deltafold.checkpoint.aligned import AlignedCheckpoint, Segment, fits_together
from deltafold.checkpoint.header import TensorInfo
from deltafold.checkpoint.hub import archive_folder, is_hub_id, local_folder, open_checkpoint
from deltafold.checkpoint.store import cache_root, is_address
from deltafold.checkpoint.view import Checkpoint
from deltafold.checkpoint.writer import CheckpointWriter, plan_shards, tensor_bytes
from deltafold.dtypes import DTYPE_NAMES, DTYPES

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "AlignedCheckpoint",
    "Checkpoint",
    "CheckpointWriter",
    "Segment",
    "TensorInfo",
    "archive_folder",
    "cache_root",
    "fits_together",
    "is_address",
    "is_hub_id",
    "local_folder",
    "open_checkpoint",
    "plan_shards",
    "tensor_bytes",
]
