"""What an error in each weight costs: the diagonal Fisher information, in factors.

    text -> fine-tune, block by block, forward and back -> for y = W x of every matrix
            columns  E[x_j^2]          rows  E[(dL/dy_r)^2],   L = log p(a token drawn from p)

Tokens are drawn by the seed from the fine-tune's own predictions, so no labels are wanted. At the
head no draw is needed: E[(dL/dz_v)^2] = p_v (1 - p_v). An embedding's rows are looked up: row v has
rows[v] = share of token v in the text, and columns[j] = E[(dL/dh_j)^2], h what it hands on. A tied
one is both; its rows are those of the head plus their shares, scaled to what they cost there.

Source: Martens and Grosse 2015 (arXiv 1503.05671), section 2 and 3, with both factors diagonal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deltafold.calibration.accumulate import Name, Products
from deltafold.calibration.backward import backward
from deltafold.calibration.batches import Batch, Sample, make_batches
from deltafold.calibration.gather import AnyText, as_sampling, gather_samples
from deltafold.calibration.kept import cache_folder, keep, key_of
from deltafold.calibration.precision import settled
from deltafold.calibration.stream import StreamedModel, default_memory_bytes
from deltafold.checkpoint import sealed
from deltafold.checkpoint.writer import guard_storage
from deltafold.coding.counter import derive_key, random_u64
from deltafold.errors import NonFiniteError
from deltafold.linalg.matrices import Fisher
from deltafold.running import devices
from deltafold.running.engine import Progress, Step

VERSION = 1
HIDDEN_BYTES = 64 << 20  # of hidden states in memory; more of them go to a file
BATCH_TOKENS = 1024  # a block's activations are kept for the way back
DRAWN_ROWS = 32  # predictions that tokens are drawn from at a time
RUN = 256  # tokens whose probabilities a GPU adds up at a time
Found = dict[str, Fisher]


def measure_fisher(
    finetuned: str | Path,
    text: AnyText,
    *,
    memory_bytes: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> Found:
    """The Fisher information of every matrix of the fine-tune, by checkpoint tensor (o x i).

    Kept on disk by what it was made from. A tensor of which the text says nothing (an expert that no
    token reached) is left out. Raises DeltafoldError.
    """
    allowance, seed = memory_bytes or default_memory_bytes(), as_sampling(text).seed
    root = cache_folder(cache)
    guard_storage(root, lambda: root.mkdir(parents=True, exist_ok=True))
    model = StreamedModel(finetuned, memory_bytes=min(allowance // 2, HIDDEN_BYTES), scratch=root)
    with contextlib.closing(model.checkpoint):
        chosen = gather_samples(model, text, memory_bytes=allowance, cache=root, restart=restart)
        identity: list[Any] = [
            VERSION,
            model.checkpoint.fingerprint(),
            [(s.ids, s.start) for s in chosen],
        ]
        if on := devices.identity():
            identity.append(on)
        path = root / f"fisher-{key_of([identity, seed])}.safetensors"
        found = None if restart else _read(path)
        if found is None:
            found = _Measurement(settled(model, chosen), chosen, seed, progress).run()
            keep("What errors cost", partial(_write, path, found))
    return found


class _Sums:
    """Sum of squares of vectors (n, w), and their number."""

    def __init__(self, width: int):
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.count = 0

    def add(self, vectors: torch.Tensor) -> None:
        flat = vectors.detach().reshape(-1, len(self.squares))
        added = flat.float().square().sum(0, dtype=torch.float64)
        self.squares = self.squares.to(added.device) + added
        self.count += len(flat)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(1, self.count)

    @property
    def total(self) -> torch.Tensor:
        """The sum, on the CPU."""
        return self.squares.cpu()


class _Watch(Products):
    """Adds squares of the inputs of matrices, and of gradients in outputs but for those `aside`."""

    def __init__(
        self,
        inputs: dict[str, _Sums],
        outputs: dict[str, _Sums],
        axes: dict[str, int],
        parameters: dict[str, nn.Parameter],
        name: Name,
        aside: Collection[str],
    ):
        super().__init__(parameters, name)
        self.inputs, self.outputs, self.axes, self.aside = inputs, outputs, axes, set(aside)

    def seen(
        self, matrix: tuple[str, int], names: tuple[str, ...], inputs: torch.Tensor, axis: int
    ) -> None:
        for name in names:
            self.inputs.setdefault(name, _Sums(inputs.shape[-1])).add(inputs)
            self.axes[name] = axis

    def made(self, names: tuple[str, ...], output: torch.Tensor, axis: int) -> None:
        if output.requires_grad and not set(names) & self.aside:
            output.register_hook(lambda gradient: self._returned(names, gradient))

    def _returned(self, names: tuple[str, ...], gradient: torch.Tensor) -> None:
        # Tensors that share a parameter share its outputs alike (the halves of a gated expert).
        each = gradient.shape[-1] // len(names)
        if each * len(names) == gradient.shape[-1]:
            for name, part in zip(names, gradient.split(each, dim=-1), strict=True):
                self.outputs.setdefault(name, _Sums(each)).add(part)


class _Measurement:
    """One pass forward and back."""

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[Sample],
        seed: int,
        progress: Progress | None,
    ):
        self.model, self.progress = model, progress
        self.batches = make_batches(samples, padded=False, batch_tokens=BATCH_TOKENS)
        self.counted = sum(sample.counted for sample in samples)
        self.key = derive_key(seed, "fisher")
        self.inputs: dict[str, _Sums] = {}
        self.outputs: dict[str, _Sums] = {}
        self.axes: dict[str, int] = {}
        self.entering: _Sums | None = None
        self.shares = torch.zeros(model.vocabulary, dtype=torch.float64)
        self.likely = torch.zeros(model.vocabulary, dtype=torch.float64)
        self.scale: float | None = None  # what the model multiplies embeddings by
        self.done = 0
        skeleton = model.skeleton
        self.head, self.embedding = (
            skeleton.matrix_names(path, 0) if path else ()
            for path in (skeleton.head_weight(), skeleton.embedding())
        )

    def run(self) -> Found:
        """The information of every matrix. Raises NonFiniteError, MismatchError."""
        backward(
            self.model,
            self.batches,
            self._loss,
            lambda name, gradient: None,
            lambda name: False,
            self._watching,
            self._entered,
        )
        found: Found = {}
        for name, outputs in self.outputs.items():
            columns, rows = self.inputs[name].mean, outputs.total / self.counted
            pair = (rows, columns) if self.axes[name] == 1 else (columns, rows)
            found[name] = _finite(self.model.label, name, *pair)
        for name in self.head:
            if name in self.inputs:
                columns = self.inputs[name].mean
                found[name] = _finite(self.model.label, name, self.likely / self.counted, columns)
        if self.embedding and self.entering is not None:
            name = self.embedding[0]
            columns = self.entering.total / self.counted * (self.scale or 1.0) ** 2
            known = found.get(name) if name in self.head else None
            if known is None:
                found[name] = _finite(self.model.label, name, self.shares, columns)
            else:
                ratio = float(columns.mean()) / max(1e-30, float(known.columns.double().mean()))
                rows = known.rows.double() + self.shares * ratio
                found[name] = _finite(self.model.label, name, rows, known.columns)
        return found

    def _watching(self, parameters: dict[str, nn.Parameter]) -> _Watch:
        self._tell()
        names = self.model.skeleton.matrix_names
        return _Watch(self.inputs, self.outputs, self.axes, parameters, names, self.head)

    def _tell(self) -> None:
        self.done += 1
        if self.progress and self.done % len(self.batches) == 0:
            total = self.model.n_blocks + 1
            blocks = min(total, self.done // len(self.batches))
            self.progress(Step("weigh", "the fine-tune", blocks, total, 0))

    def _loss(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Minus the log probability of a token drawn for each row; notes p (1 - p)."""
        tokens = [
            self._draw(first + start, rows)
            for start, rows in zip(
                range(0, len(logits), DRAWN_ROWS), logits.detach().split(DRAWN_ROWS), strict=True
            )
        ]
        return torch.nn.functional.cross_entropy(logits.float(), torch.cat(tokens), reduction="sum")

    @torch.no_grad()
    def _draw(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """A token for each row, by the seed."""
        p = logits.double().softmax(-1)
        if not p.isfinite().all():
            raise NonFiniteError(
                f"{self.model.label} gives NaN or infinite predictions; its weights are damaged."
            )
        self.likely += (p * (1 - p)).sum(0).cpu()
        draws = random_u64(self.key, first, first + len(p)) >> np.uint64(11)
        level = torch.from_numpy(draws.astype(np.float64) * 2.0**-53)[:, None]
        return drawn(p, level).to(logits.device)

    def _entered(self, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        self.entering = self.entering or _Sums(gradient.shape[-1])
        self.entering.add(gradient)
        ids = batch.ids.reshape(-1)
        total = sum(each.ids.numel() for each in self.batches)
        self.shares += torch.bincount(ids, minlength=len(self.shares)) / total
        if self.embedding and self.scale is None:
            # Gemma: the root of their width. Positions that are added count as noise.
            rows = self.model.weights(self.embedding[0])[ids].double()
            along = float((rows * hidden.reshape(rows.shape)).sum())
            self.scale = along / max(1e-30, float(rows.square().sum()))


def drawn(p: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The token (n,) on which each level (n, 1), in [0, 1), falls, by probabilities p (n, v); CPU.

    On a GPU a running sum may round differently each time. So there the sums are of runs of tokens,
    which are fixed, and running sums are taken on the CPU: over runs, then within the one reached.
    """
    if p.device.type == "cpu":
        reached = p.cumsum(-1)
        tokens = torch.searchsorted(reached, level * reached[:, -1:], right=True)[:, 0]
        return tokens.clamp_(max=p.shape[-1] - 1)
    return _drawn_by_runs(p, level)


def _drawn_by_runs(p: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    runs = nn.functional.pad(p, (0, -p.shape[1] % RUN)).unflatten(1, (-1, RUN))  # n, v / RUN, RUN
    sums = runs.sum(-1).cpu()
    reached = sums.cumsum(-1)
    goal = level * reached[:, -1:]
    run = torch.searchsorted(reached, goal, right=True).clamp_(max=runs.shape[1] - 1)
    before = (reached - sums).gather(1, run)
    rows = torch.arange(len(p), device=p.device)
    within = runs[rows, run[:, 0].to(p.device)].cpu().cumsum(-1)
    token = torch.searchsorted(within, goal - before, right=True).clamp_(max=RUN - 1)
    return (run * RUN + token)[:, 0].clamp_(max=p.shape[1] - 1)


def _finite(label: str, name: str, rows: torch.Tensor, columns: torch.Tensor) -> Fisher:
    found = Fisher(rows.float(), columns.float())
    if not (found.rows.isfinite().all() and found.columns.isfinite().all()):
        raise NonFiniteError(
            f"{label} gives NaN or infinite values at {name}; its weights are damaged."
        )
    return found


def _write(path: Path, found: Found) -> None:
    """One sealed safetensors file: NAME.rows, NAME.columns."""
    tensors: dict[str, torch.Tensor] = {}
    for name, each in sorted(found.items()):
        tensors |= {f"{name}.rows": each.rows, f"{name}.columns": each.columns}
    sealed.save_tensors(path, tensors)


def _read(path: Path) -> Found | None:
    """What was written; None where there is none, or it is damaged."""
    if not sealed.take_up(path):
        return None
    with sealed.open_tensors(path) as file:
        names = {name.rpartition(".")[0] for name in file.tensors}
        return {
            name: Fisher(file.tensor(f"{name}.rows"), file.tensor(f"{name}.columns"))
            for name in sorted(names)
        }
