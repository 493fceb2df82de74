"""Text run through the restored model for `export`: inputs of layers, and what an adapter loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltafold.errors import UsageError
from deltafold.exporting.job import ExportJob
from deltafold.exporting.request import ExportRequest
from deltafold.linalg.matrices import Moments
from deltafold.restoring.decode import assembled, decoded_rows
from deltafold.running.engine import Progress

if TYPE_CHECKING:
    from deltafold.calibration.moments import Calibration

Weights = Callable[[str], torch.Tensor]


class ExportText:
    """Samples for the restored model, which is run as the base with other weights.

    Raises UsageError, CheckpointError, MismatchError where the model or the text cannot be run.
    """

    def __init__(self, job: ExportJob, request: ExportRequest, scratch: Path):
        from deltafold.calibration import Sampling, StreamedModel, gather_samples

        source, memory_bytes = request.calibration or "general", request.memory_bytes
        if str(source) == "self":
            raise UsageError(
                "--calibration self is not offered here; give a file, datasets:NAME or general."
            )
        self.job = job
        self.model = StreamedModel(
            job.base, self.restored, memory_bytes=memory_bytes, scratch=scratch
        )
        self.source = str(source)
        self.samples = gather_samples(
            self.model,
            Sampling(source, request.samples, request.max_tokens),
            memory_bytes=memory_bytes,
        )

    def restored(self, name: str) -> torch.Tensor:
        """A tensor of the restored model in its shape, but with no more rows than the base has."""
        tensor = self.job.archive.by_name.get(name)
        if tensor is None:
            return self.job.base.tensor(name)
        whole = assembled(tensor, decoded_rows(self.job.archive, tensor, self.job.base))
        rows = self.job.base.tensors[name].shape[:1]
        return whole[: rows[0]] if rows and len(whole) > rows[0] else whole

    def moments(
        self, folder: Path, allowance_bytes: int, progress: Progress | None
    ) -> Mapping[str, Moments]:
        """Second moments of the inputs of every matrix, kept in `folder` and read when asked for."""
        from deltafold.calibration.measure import measure
        from deltafold.calibration.moments import Calibration

        folder.mkdir(parents=True, exist_ok=True)
        places = measure(self.model, self.samples, folder, True, allowance_bytes, progress)
        return _Moments(Calibration(folder, list(self.samples), {"tensors": places}))

    def judge(self, candidates: Mapping[str, Weights], memory_bytes: int | None) -> dict[str, Any]:
        """KL and agreement of each candidate's predictions with those of the restored model."""
        from deltafold.calibration import Judge

        found: dict[str, Any] = {"source": self.source, "samples": len(self.samples)}
        with Judge(self.model, None, self.samples, memory_bytes) as judge:
            found["tokens"] = judge.tokens
            for label, weights in candidates.items():
                each = judge.compare(weights)
                found[label] = {"kl": each.kl, "agreement": each.agreement}
        return found


class _Moments(Mapping[str, Moments]):
    """Moments of tensors whose inputs run along their in features and were seen."""

    def __init__(self, calibration: Calibration):
        self._calibration = calibration

    def __getitem__(self, name: str) -> Moments:
        if (found := self._calibration.moments(name)) is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._calibration.names)

    def __len__(self) -> int:
        return len(self._calibration.names)
