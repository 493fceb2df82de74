"""`skip`: the fine-tune's rows equal the base's. Nothing is stored, nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.lazy import torch


class Skip(ExactCodec):
    name = "skip"
    title = "exact: equal tensors, nothing kept"
    paper = "-"
    method = False

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        """No parts. The caller has compared the bits, (o, i) on both sides."""
        return {}, {}

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        return reference


CODEC = Skip
