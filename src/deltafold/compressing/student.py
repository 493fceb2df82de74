"""A plan's encoded pieces as a candidate under training."""

from __future__ import annotations

from deltafold.checkpoint import DTYPES
from deltafold.coding.sums import rounded_sum
from deltafold.coding.trainable import Trainable, Values
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.lazy import torch
from deltafold.running.workspace import Workspace


class PlanStudent:
    """Weights of a plan as it would be restored, and the values that its pieces are made of.

    Values go by `STEM/NAME`. What does not change (levels, signs) is kept in memory if a byte a
    weight fits `memory_bytes`, else decoded whenever it is needed.
    """

    def __init__(self, job: CompressJob, plan: Plan, workspace: Workspace, memory_bytes: int):
        self.job, self.workspace = job, workspace
        self.tensors = {tensor.pairing.name: tensor for tensor in plan.tensors}
        self.values: Values = {}
        self.gradients: Values = {}
        self.rates: dict[str, float] = {}
        self.trained: dict[str, PlannedPiece] = {}
        self._owners: set[str] = set()
        self._held: dict[str, Trainable] = {}
        elements = sum(t.shape(p)[0] * t.shape(p)[1] for t, p in plan.lossy)
        self._keeps = elements <= memory_bytes
        for tensor, piece in plan.lossy:
            self._add(tensor, piece)

    def _add(self, tensor: PlannedTensor, piece: PlannedPiece) -> None:
        found = self._load(tensor, piece)
        if found is None:
            return
        self.trained[piece.stem] = piece
        self._owners.add(tensor.pairing.name)
        for name, value in found.values.items():
            self.values[f"{piece.stem}/{name}"] = value
            self.rates[f"{piece.stem}/{name}"] = found.rates[name]
        if self._keeps:
            self._held[piece.stem] = found

    def _load(self, tensor: PlannedTensor, piece: PlannedPiece) -> Trainable | None:
        parts = self.workspace.load_tensors(f"lossy/{piece.stem}.safetensors")
        key = self.job.key(tensor.pairing.name, piece.start)
        codec = self.job.codec(piece.codec)
        return codec.trainable(parts, piece.settings, tensor.shape(piece), key)

    def trainable(self, tensor: PlannedTensor, piece: PlannedPiece) -> Trainable:
        """The trainable side of a piece in `trained`."""
        found = self._held.get(piece.stem) or self._load(tensor, piece)
        assert found is not None
        return found

    def values_of(self, piece: PlannedPiece, values: Values | None = None) -> Values:
        """A piece's own values, of any shapes, of those given or of the present ones."""
        start = f"{piece.stem}/"
        held = self.values if values is None else values
        return {k.removeprefix(start): v for k, v in held.items() if k.startswith(start)}

    def wanted(self, name: str) -> bool:
        """True if values depend on the gradient of this checkpoint tensor."""
        tensor = self.tensors[name]
        return (tensor.same_as or name) in self._owners

    @torch.no_grad()
    def weights(self, name: str) -> torch.Tensor:
        """A checkpoint tensor as it would be restored, in its shape."""
        tensor = self.tensors[name]
        tensor = self.tensors[tensor.same_as] if tensor.same_as else tensor
        info = tensor.pairing.tuned
        whole = self.job.pair.finetuned.tensor(info.name)
        matrix = whole.reshape(info.matrix_shape)
        for piece in tensor.pieces:
            if not piece.lossy:
                continue
            base = self.job.pair.base.rows(info.name, piece.start, piece.stop).float()
            restored = rounded_sum(base, self._delta(tensor, piece), DTYPES[info.dtype])
            if piece.stop - piece.start == matrix.shape[0]:
                return restored.reshape(info.shape)
            matrix = torch.cat([matrix[: piece.start], restored, matrix[piece.stop :]])
        return matrix.reshape(info.shape)

    def _delta(self, tensor: PlannedTensor, piece: PlannedPiece) -> torch.Tensor:
        if piece.stem in self.trained:
            return self.trainable(tensor, piece).delta(self.values_of(piece))
        parts = self.workspace.load_tensors(f"lossy/{piece.stem}.safetensors")
        key = self.job.key(tensor.pairing.name, piece.start)
        codec = self.job.codec(piece.codec)
        rows = codec.decode(parts, piece.settings, tensor.shape(piece), key)
        return torch.cat([each for _, each in rows])

    def pull(self, name: str, gradient: torch.Tensor) -> None:
        """Add to `gradients` what the gradient of a checkpoint tensor (its shape) means for the values."""
        for tensor, piece, rows in self._pieces(name, gradient):
            leaves = {
                key: value.detach().requires_grad_() for key, value in self.values_of(piece).items()
            }
            with torch.enable_grad():
                self.trainable(tensor, piece).delta(leaves).backward(rows)
            for key, leaf in leaves.items():
                if leaf.grad is not None:
                    at = f"{piece.stem}/{key}"
                    held = self.gradients.get(at)
                    self.gradients[at] = leaf.grad if held is None else held + leaf.grad

    def begin(self, name: str, gradient: torch.Tensor) -> None:
        """Choose values to start from, given the gradient of a checkpoint tensor, of its shape."""
        for tensor, piece, rows in self._pieces(name, gradient):
            for key, value in self.trainable(tensor, piece).start(rows).items():
                self.values[f"{piece.stem}/{key}"] = value

    def _pieces(
        self, name: str, gradient: torch.Tensor
    ) -> list[tuple[PlannedTensor, PlannedPiece, torch.Tensor]]:
        """Trained pieces of a tensor, each with its rows of the tensor's gradient."""
        tensor = self.tensors[name]
        tensor = self.tensors[tensor.same_as] if tensor.same_as else tensor
        matrix = gradient.float().reshape(tensor.pairing.tuned.matrix_shape)
        return [
            (tensor, piece, matrix[piece.start : piece.stop])
            for piece in tensor.pieces
            if piece.stem in self.trained
        ]
