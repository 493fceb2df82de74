"""A folded model quantised by torchao: weights alone, loadable by transformers with torchao.

    int8   one scale a row
    int4   one scale for 32 values; kept in bytes, as the kernels of a CPU want them

Unlike the rest of `fold` this holds the whole folded model in memory, as transformers does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.batches import Sample
from deltafold.calibration.models import (
    check_keys,
    class_of,
    config_of,
    load_folder,
    quiet,
)
from deltafold.checkpoint.beside import copy_beside
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import DeltafoldError, UsageError, nearest
from deltafold.folding.request import QUANTISERS
from deltafold.foreign import blamed, first_line

GROUP = 32


def check_quantize(kind: str | None) -> None:
    """Refuse, before work begins, what cannot be done. Raises UsageError."""
    if kind is None:
        return
    if kind not in QUANTISERS:
        raise UsageError(f"There is no quantisation {kind!r}; {nearest(kind, list(QUANTISERS))}")
    try:
        import torchao  # noqa: F401  (an extra)
    except ImportError:
        raise UsageError(
            "Quantising needs the package torchao: pip install 'deltafold[quantize]'."
        ) from None


def _config(kind: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    four = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP)))


def quantize_folder(folder: Path, target: Path, kind: str) -> None:
    """The model of `folder`, quantised, into `target`, with the same tokenizer. Raises DeltafoldError."""
    config = config_of(folder)
    made = class_of(config, str(folder))
    try:
        with quiet():
            model, info = made.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                quantization_config=_config(kind),
                local_files_only=True,
                output_loading_info=True,
            )
            check_keys(model, info, str(folder))
            guard_storage(target, lambda: model.save_pretrained(target))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        raise blamed(
            error,
            DeltafoldError(
                f"torchao cannot quantise this model to {kind} ({first_line(error)}); fold it without "
                "--quantize."
            ),
        ) from error
    copy_beside(folder, target)


@torch.no_grad()
def perplexity_of(folder: Path, samples: list[Sample]) -> float:
    """Perplexity of a folder's model, loaded by transformers, on samples."""
    model = load_folder(folder, dtype="auto")
    lost, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        logits = model.eval()(ids, use_cache=False).logits[0, sample.start - 1 : -1].float()
        targets = ids[0, sample.start :]
        lost += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return float(torch.tensor(lost / count, dtype=torch.float64).exp())
