"""A fine-tune beside its base: which tensor refers to which, decided from headers alone.

`Pair.base` has the fine-tune's names, whatever the base calls its tensors: see `alignment.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deltafold.checkpoint import DTYPES, Checkpoint, Segment, TensorInfo, open_checkpoint
from deltafold.coding.sums import rounded_sum
from deltafold.compressing.alignment import Alignment, align
from deltafold.dtypes import BITS, FLOATING, ITEM_BYTES
from deltafold.errors import MismatchError
from deltafold.lazy import torch
from deltafold.linalg.matrices import Fisher
from deltafold.names import block_of, is_vocabulary, quantisation, role_of

MIN_SIDE = 16  # a matrix narrower than this is stored exactly
MIN_ELEMENTS = 1024
_EXACT_ROLES = ("norm", "bias", "router")
_SAME_CONFIG = {
    "model_type": "model type",
    "num_hidden_layers": "number of blocks",
    "n_layer": "number of blocks",
    "hidden_size": "hidden size",
    "n_embd": "hidden size",
}


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a tensor, and whether the base has them too."""

    start: int
    stop: int
    in_base: bool

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pairing:
    """One tensor of the fine-tune and its counterpart.

    `vocabulary`: its rows are vocabulary entries. `found`: where the counterpart is in the base, if
    it was found under another name. `why`: why there is none.
    """

    tuned: TensorInfo
    base: TensorInfo | None
    spans: tuple[Span, ...]
    vocabulary: bool = False
    found: tuple[Segment, ...] = ()
    why: str = "only in the fine-tune"
    exact: str | None = None  # why it must be exact, whatever its size and dtype

    @property
    def name(self) -> str:
        return self.tuned.name

    def lossy_allowed(self, span: Span) -> bool:
        """True if a delta codec may approximate these rows (big float matrices, no norms)."""
        columns = self.tuned.matrix_shape[1]
        dtype = self.tuned.dtype
        return (
            span.in_base
            and self.exact is None
            and dtype in FLOATING
            and ITEM_BYTES[dtype] >= 2
            and role_of(self.name) not in _EXACT_ROLES
            and len(self.tuned.shape) >= 2
            and min(span.rows, columns) >= MIN_SIDE
            and span.rows * columns >= MIN_ELEMENTS
        )


@dataclass
class Pair:
    """Both checkpoints, open, and how their tensors correspond."""

    base: Checkpoint
    finetuned: Checkpoint
    pairings: list[Pairing] = field(default_factory=list)
    origin: Checkpoint = field(init=False)  # the base under its own names
    alignment: Alignment = field(init=False)

    def __post_init__(self) -> None:
        self.origin = self.base
        self.base, self.alignment = align(self.origin, self.finetuned)

    @property
    def removed(self) -> list[str]:
        """Tensors of the base that nothing in the fine-tune refers to, by their own names."""
        taken = self.alignment.taken()
        return [
            name
            for name in self.origin.tensors
            if name not in taken and name not in self.finetuned.tensors
        ]

    def close(self) -> None:
        self.origin.close()
        self.finetuned.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_pair(base: str | Path, finetuned: str | Path) -> Pair:
    """Open both and pair their tensors. Raises CheckpointError, MismatchError."""
    pair = Pair(open_checkpoint(base), open_checkpoint(finetuned))
    _check_configs(pair.base, pair.finetuned)
    if not set(pair.base.tensors) & set(pair.finetuned.tensors):
        a, b = next(iter(pair.origin.tensors), "-"), next(iter(pair.finetuned.tensors), "-")
        raise MismatchError(
            f"{pair.base.label} and {pair.finetuned.label} have no tensor name in common "
            f"({a!r}, {b!r}); give the checkpoint that was fine-tuned as the base."
        )
    grown, tensors = _vocabulary_sizes(pair), pair.finetuned.tensors
    packed = [name for name, info in tensors.items() if _is_packed(info)]
    exact = dict.fromkeys(quantisation(tensors, packed), "belongs to quantised weights")
    for info in tensors.values():
        pair.pairings.append(replace(_pairing(pair, info, grown), exact=exact.get(info.name)))
    return pair


def _is_packed(info: TensorInfo) -> bool:
    """Integers or 8-bit floats: codes of quantised weights, as far as a header tells."""
    return (
        info.dtype != "BOOL"
        and len(info.shape) > 0
        and (info.dtype not in FLOATING or ITEM_BYTES[info.dtype] == 1)
    )


def _check_configs(base: Checkpoint, finetuned: Checkpoint) -> None:
    ours, theirs = base.config(), finetuned.config()
    for key, words in _SAME_CONFIG.items():
        a, b = ours.get(key), theirs.get(key)
        if a is not None and b is not None and _plain(a) != _plain(b):
            raise MismatchError(
                f"The architectures don't match: {words} is {a} in {base.label} and {b} in "
                f"{finetuned.label}; give the checkpoint that was fine-tuned as the base."
            )


def _plain(value: object) -> object:
    """A model type without what marks the text part of a larger one."""
    return value.removesuffix("_text") if isinstance(value, str) else value


def _vocabulary_sizes(pair: Pair) -> set[tuple[int, int]]:
    """(entries in the base, in the fine-tune) of vocabularies that differ, from embeddings and configs."""
    sizes = {
        (base.shape[0], info.shape[0])
        for name, info in pair.finetuned.tensors.items()
        if is_vocabulary(name)
        and len(info.shape) == 2
        and (base := pair.base.tensors.get(name)) is not None
        and base.shape[1:] == info.shape[1:]
    }
    sizes |= {
        (a, b)
        for key, a in _vocabulary_entries(pair.origin.config()).items()
        if (b := _vocabulary_entries(pair.finetuned.config()).get(key)) is not None
    }
    return {(a, b) for a, b in sizes if a != b}


def _vocabulary_entries(config: Mapping[str, object], depth: int = 3) -> dict[str, int]:
    """All `vocab_size`s of a config, by their path in it."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, int) and key.endswith("vocab_size"):
            found[key] = value
        elif isinstance(value, dict) and depth:
            inner = _vocabulary_entries(value, depth - 1)
            found |= {f"{key}.{name}": size for name, size in inner.items()}
    return found


def _pairing(pair: Pair, info: TensorInfo, grown: set[tuple[int, int]]) -> Pairing:
    base = pair.base.tensors.get(info.name)
    vocabulary, found = is_vocabulary(info.name), pair.alignment.sources.get(info.name, ())
    whole = (Span(0, info.matrix_shape[0], False),)
    if base is None:
        return Pairing(info, None, whole, vocabulary)
    if (base.dtype in FLOATING) != (info.dtype in FLOATING):
        raise MismatchError(
            f"Tensor {info.name} is {base.dtype} in {pair.base.label} and {info.dtype} in "
            f"{pair.finetuned.label}; give both unquantised."
        )
    if base.dtype != info.dtype and BITS & {base.dtype, info.dtype}:  # no values to convert
        return Pairing(info, None, whole, vocabulary, (), f"has dtype {base.dtype} in the base")
    if base.shape == info.shape or (found and base.matrix_shape == info.matrix_shape):
        return Pairing(info, base, _matrices(info), vocabulary, found)
    same_rows = len(info.shape) >= 2 and base.shape[1:] == info.shape[1:]
    if same_rows and ((vocabulary and len(info.shape) == 2) or _sizes(base, info, grown) == {0}):
        common = min(base.shape[0], info.shape[0])
        spans = [Span(0, common, True)]
        if info.shape[0] > common:
            spans.append(Span(common, info.shape[0], False))
        return Pairing(info, base, tuple(spans), True, found)
    if _sizes(base, info, grown) or (block_of(info.name) is None and not vocabulary):
        why = f"has shape {list(base.shape)} in the base"
        return Pairing(info, None, whole, vocabulary, (), why)
    raise MismatchError(
        f"Tensor {info.name} has shape {list(base.shape)} in {pair.base.label} and "
        f"{list(info.shape)} in {pair.finetuned.label}; they are not base and fine-tune."
    )


def _sizes(base: TensorInfo, tuned: TensorInfo, grown: set[tuple[int, int]]) -> set[int]:
    """Dimensions that differ, if all of them are those of a vocabulary."""
    if len(base.shape) != len(tuned.shape):
        return set()
    pairs = list(zip(base.shape, tuned.shape, strict=True))
    differing = {at for at, (a, b) in enumerate(pairs) if a != b}
    return differing if all(pairs[at] in grown for at in differing) else set()


def _matrices(info: TensorInfo) -> tuple[Span, ...]:
    """A stack of matrices (fused experts) is one span a matrix; anything else is one span."""
    n_rows = info.matrix_shape[0]
    if len(info.shape) >= 3 and min(info.shape[-2:]) >= MIN_SIDE:
        height = info.shape[-2]
        return tuple(Span(at, at + height, True) for at in range(0, n_rows, height))
    return (Span(0, n_rows, True),)


class DeltaRows:
    """The delta of a span as a `RowMatrix`: fp32 rows, read and subtracted when asked.

    Small matrices are kept after the first read; an embedding is read again on each pass.
    """

    KEEP_BYTES = 96 << 20

    def __init__(self, pair: Pair, pairing: Pairing, span: Span, fisher: Fisher | None = None):
        self.fisher = fisher
        self._pair = pair
        self._name = pairing.name
        self._span = span
        self._held: torch.Tensor | None = None
        self._dtype = DTYPES[pairing.tuned.dtype]
        self.shape = (span.rows, pairing.tuned.matrix_shape[1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows (stop - start, columns) of the delta, fp32."""
        if self.shape[0] * self.shape[1] * 4 > self.KEEP_BYTES:
            return self._read(start, stop)
        if self._held is None:
            self._held = self._read(0, self.shape[0])
        return self._held[start:stop]

    def settle(self, start: int, change: torch.Tensor) -> torch.Tensor:
        """See `RowMatrix`: of a change (n, columns)."""
        first = self._span.start + start
        rows = self._pair.base.rows(self._name, first, first + len(change))
        base = rows.to(change.device).float()
        return rounded_sum(base, change.clone(), self._dtype).float().sub_(base)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        offset = self._span.start
        tuned = self._pair.finetuned.rows(self._name, offset + start, offset + stop).float()
        return tuned.sub_(self._pair.base.rows(self._name, offset + start, offset + stop).float())
