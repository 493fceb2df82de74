"""What a codec is: a pair encode/decode for one piece (a matrix of rows) of one tensor.

Two kinds. An `ExactCodec` gives back every bit of the fine-tune's rows from the base's rows. A
`DeltaCodec` gives an approximation of the delta (fine-tune minus base, fp32); the caller adds it to
the base in fp32 and rounds once.

Adding a codec is one new file in this folder (or an entry point in the group `deltafold.codecs`):
a subclass with its class attributes filled in, assigned to `CODEC`. It then appears in
`--method`, in `deltafold methods`, in the tests that run over every codec, and in the benchmark.
A codec is pure: it knows tensors and integers, no file and no model. What torch is set to outside
(default dtype, default device, ...) does not reach it: see `Codec.__init_subclass__`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.trainable import Trainable
from deltafold.dtypes import DTYPE_NAMES, DTYPES, ITEM_BYTES
from deltafold.errors import UsageError, nearest
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix
from deltafold.running.neutral import undisturbed

Shape = tuple[int, int]
Settings = dict[str, Any]
Parts: TypeAlias = "dict[str, torch.Tensor]"
Spectrum = NDArray[np.float64]
VALUE_DTYPES = {"fp16": "F16", "bf16": "BF16"}
"""Dtypes of stored values, as safetensors names them."""


def parts_bytes(parts: Parts) -> int:
    """Bytes of all parts together, whatever their shapes."""
    return sum(part.numel() * part.element_size() for part in parts.values())


@dataclass(frozen=True, init=False)
class PartSpec:
    """Dtype and shape of one stored part.

    A dtype may be given as safetensors names it, `F16`, or as torch does: the name counts bytes
    without importing torch.
    """

    dtype_name: str
    shape: tuple[int, ...]

    def __init__(self, dtype: str | torch.dtype, shape: tuple[int, ...]):
        name = dtype if isinstance(dtype, str) else DTYPE_NAMES[dtype]
        object.__setattr__(self, "dtype_name", name)
        object.__setattr__(self, "shape", shape)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def n_bytes(self) -> int:
        return ITEM_BYTES[self.dtype_name] * math.prod(self.shape)


@dataclass(frozen=True)
class Config:
    """A codec's settings, the same for every matrix of a run. Subclasses add bounded fields."""

    value_dtype: str = "fp16"

    def __post_init__(self) -> None:
        if self.value_dtype not in VALUE_DTYPES:
            raise UsageError(f"value_dtype must be fp16 or bf16, not {self.value_dtype!r}.")

    @property
    def dtype_name(self) -> str:
        """Dtype of stored values, as safetensors names it."""
        return VALUE_DTYPES[self.value_dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored value."""
        return ITEM_BYTES[self.dtype_name]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @classmethod
    def from_options(cls, method: str, options: Mapping[str, Any]) -> Config:
        """Build from what a user gave; None means the default; an unknown name is refused."""
        known = {field.name: field for field in fields(cls)}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"The method {method} has no setting {name!r}; {nearest(name, sorted(known))}"
                )
        return replace(cls(), **given)

    def to_json(self) -> Settings:
        return asdict(self)

    @staticmethod
    def check(name: str, value: Any, low: float, high: float) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value!r}.")


_CODING = ("encode", "decode", "factors", "trainable", "pilot")


class Codec(ABC):
    """What exact and delta codecs share."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every codec codes and decodes in a torch that is as at its start, whoever calls it."""
        super().__init_subclass__(**kwargs)
        for name in _CODING:
            if name in cls.__dict__:
                setattr(cls, name, undisturbed(cls.__dict__[name]))

    name: ClassVar[str]
    version: ClassVar[int] = 1
    title: ClassVar[str]  # one line for `deltafold methods`
    paper: ClassVar[str]  # where it comes from
    lossy: ClassVar[bool]
    method: ClassVar[bool] = True  # offered as --method
    seeded: ClassVar[bool] = False  # another seed gives another archive
    variable: ClassVar[bool] = False  # bytes are known only after encoding; see `VariableCodec`
    uses_moments: ClassVar[bool] = False  # does better when it knows the layer's inputs
    uses_fisher: ClassVar[bool] = False  # looks at `delta.fisher`: what errors cost
    Config: ClassVar[type[Config]] = Config


class ExactCodec(Codec):
    """Restores every bit. Works on tensors of any dtype, seen as matrices (o x i)."""

    lossy = False

    @abstractmethod
    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        """Parts from which `tuned` follows when `reference` (same shape and dtype) is at hand."""

    @abstractmethod
    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        """`tuned`, every bit, in the shape (o, i) of `reference`.

        Raises ValueError if the parts do not fit together.
        """


class DeltaCodec(Codec):
    """Approximates the delta of an o x i matrix within a share of its values.

    `share` is kept values / (o i), the inverse of the papers' compression ratio on one matrix; where
    values are quantised, it is stored bits of values / (16 o i).
    """

    lossy = True
    uses_factors: ClassVar[bool] = False  # wants the singular value decomposition of the delta
    value_parts: ClassVar[tuple[str, ...]]  # parts that the papers count

    def __init__(self, config: Config | None = None):
        self.config = config or self.Config()

    def components_for(self, shape: Shape, share: float) -> int:
        """How many singular triplets to compute at first for this share."""
        return 0

    def components_used(self, shape: Shape, share: float, spectrum: Spectrum) -> int | None:
        """How many of the leading triplets matter at this share; None if more must be computed."""
        return 0

    @abstractmethod
    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        """The paper's formula: what to keep of a matrix of this shape at this share."""

    @abstractmethod
    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        """The parts that `encode` will give: names, dtypes, shapes. Hence the exact bytes."""

    @abstractmethod
    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        """Parts of the delta (o x i), and the settings with what only encoding can know filled in.

        `moments` are those of the layer's inputs, where calibration has seen them; a codec must
        also do without.
        """

    @abstractmethod
    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The approximated delta as (first row, fp32 rows (n, i)), in order, covering all o rows.

        Raises ValueError if the parts do not fit together.
        """

    def factors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(left r x o, right r x i), fp32, with delta = left^T right; None if it is no such product.

        Raises ValueError if the parts do not fit together.
        """
        return None

    def trainable(
        self, parts: Parts, settings: Settings, shape: Shape, key: int
    ) -> Trainable | None:
        """What training may change of the parts of a delta (o x i); None if nothing."""
        return None

    def part_bytes(self, shape: Shape, settings: Settings) -> int:
        """Bytes of all parts."""
        return sum(spec.n_bytes for spec in self.layout(shape, settings).values())

    def value_bytes(self, shape: Shape, settings: Settings) -> int:
        """Bytes of the parts that the papers count."""
        layout = self.layout(shape, settings)
        return sum(layout[name].n_bytes for name in self.value_parts if name in layout)

    def fit(
        self, shape: Shape, target_bytes: float, spectrum: Spectrum | None, nominal: bool
    ) -> tuple[Settings, int]:
        """The largest settings that cost at most `target_bytes`, and what they cost.

        `nominal` counts only the values, as the papers do. Bisection on the share, up to
        `largest_share`; the cost may have steps (a rank, a component). The share is rounded to six
        digits, so that it is short in the manifest.
        """
        measure = self.value_bytes if nominal else self.part_bytes
        low, high = 0.0, self.largest_share(shape, target_bytes)
        best = self.settings_for(shape, 0.0, spectrum)
        best_bytes = measure(shape, best)
        for _ in range(30):
            share = float(f"{(low + high) / 2:.6g}")
            settings = self.settings_for(shape, share, spectrum)
            if (cost := measure(shape, settings)) <= target_bytes:
                low, best, best_bytes = share, settings, cost
            else:
                high = share
        return best, best_bytes

    def largest_share(self, shape: Shape, target_bytes: float) -> float:
        """A share that surely costs more than `target_bytes`: what `fit` looks at, at most.

        A quarter above the share that the values alone would pay for, and one whole component.
        """
        o, i = shape
        paid = target_bytes / (o * i * self.config.item_bytes)
        return min(1.0, 1.25 * paid + (o + i) / (o * i))


class VariableCodec(DeltaCodec):
    """A codec whose bytes depend on the values: they are entropy coded.

    Its settings hold a `step`; the larger, the fewer bytes. `settings_for` and `layout` estimate.
    """

    variable = True

    @abstractmethod
    def pilot(self, delta: RowMatrix, steps: list[float], key: int) -> list[float]:
        """Bytes of the matrix at each step, judged from a sample of it, without moments."""


def check_parts(parts: Mapping[str, torch.Tensor], layout: Mapping[str, PartSpec]) -> None:
    """Raises ValueError for parts whose names, dtypes or shapes are not those of their layout.

    A part may have any shape.
    """
    for name, spec in layout.items():
        if name not in parts:
            raise ValueError(f"part {name!r} is missing")
        part = parts[name]
        if part.dtype != spec.dtype or tuple(part.shape) != spec.shape:
            raise ValueError(
                f"part {name!r} is {part.dtype} {tuple(part.shape)}, "
                f"not {spec.dtype} {spec.shape} as its settings say"
            )


def unit_scale(peak: float) -> float:
    """Divisor that brings values of this largest magnitude into [-1, 1], where 16 bits serve them.

    Deltas are small (1e-6 to 1e-2); below 6e-5 an fp16 loses bits.
    """
    return peak if peak > 0 else 1.0
