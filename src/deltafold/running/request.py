"""Requests: all that a verb is asked, as a frozen dataclass in which every option is written once.

    @asked
    class FoldRequest(Request, ...):
        blocks: int | None = option("Blocks that go.", default=None, panel=SIZE, flags=("-n",))

Command line, grouped help, the Python front, the option table of the docs, the record's settings and
the identity of unfinished work are all made from these fields. Nothing heavy is imported here, so that
what is asked is checked before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_type_hints

from deltafold.errors import UsageError, nearest

WHAT, SIZE, TEXT, TRAINING, WHERE, OUTPUT = (
    "What", "How much", "Text", "Training", "Where it runs", "Output",
)  # fmt: skip
PANELS = (WHAT, SIZE, TEXT, TRAINING, WHERE, OUTPUT)
_KEY = "deltafold"
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """What is said of one field.

    `doc` is its line in help and docs. `low` and `high` may be reached, `above` and `below` may not.
    `choices` are names, or a function that gives them; `noun` says what they are in a message. `wrong`
    is the sentence for a value out of bounds, with `{value}` in it. `parse` turns text into the value.
    `old` are former names in Python, `old_flags` on the command line. `identity` is False where the
    option changes no byte of the result, `record` where the record does not list it as a setting,
    `cli` and `python` where it is for the other of the two alone.
    """

    doc: str
    panel: str = WHAT
    flag: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    is_argument: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None
    noun: str = ""
    wrong: str = ""
    parse: Callable[[str, str], Any] | None = None
    shown_default: str | None = None
    old: tuple[str, ...] = ()
    old_flags: tuple[str, ...] = ()
    identity: bool = True
    record: bool = True
    cli: bool = True
    python: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError for a value out of bounds, and for one that is no choice."""
        if value is None:
            return
        if self.choices is not None:
            known = list(self.choices() if callable(self.choices) else self.choices)
            if value not in known:
                raise UsageError(
                    f"There is no {self.noun or name} {value!r}; {nearest(str(value), known)}"
                )
            return
        bounds = (self.low, self.high, self.above, self.below)
        if all(bound is None for bound in bounds):
            return
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            raise UsageError(f"{name} must be a number, not {value!r}.")
        if (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        ):
            raise UsageError(self.wrong.format(value=value) or self._out_of_bounds(name, value))

    def _out_of_bounds(self, name: str, value: Any) -> str:
        flag = self.flag or flag_of(name)
        if self.low is not None and value < self.low:
            return f"{flag} {value} is too small; give at least {self.low:g}."
        if self.high is not None and value > self.high:
            return f"{flag} {value} is too large; give at most {self.high:g}."
        if self.above is not None and value <= self.above:
            return f"{flag} {value} is too small; give a number above {self.above:g}."
        return f"{flag} {value} is too large; give a number below {self.below:g}."


def option(
    doc: str, *, default: Any = dataclasses.MISSING, kw_only: bool = True, **said: Any
) -> Any:
    """A field of a request; without `default` it has to be given. `said`: see `Option`."""
    kind: dict[str, Any] = {"metadata": {_KEY: Option(doc, **said)}, "kw_only": kw_only}
    return dataclasses.field(default=default, **kind)


def argument(
    doc: str, *, default: Any = dataclasses.MISSING, kw_only: bool = False, **said: Any
) -> Any:
    """A field that Python may be given by place: a source, an output, a method.

    No setting of the record, as inputs are known by their content. With a `flag` it is an option on the
    command line. A type checker wants to read `kw_only=False` where it is called.
    """
    more: dict[str, Any] = {
        "identity": False, "record": False, "is_argument": "flag" not in said,
    } | said  # fmt: skip
    return option(doc, default=default, kw_only=kw_only, **more)


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(option, argument, dataclasses.field),
)
def asked(kind: type[T]) -> type[T]:
    """The decorator of a request: a frozen dataclass, whose options are keywords."""
    return dataclass(frozen=True)(kind)


@asked
class Request:
    """The base of all requests. Made, every field has been parsed and checked."""

    more_help: ClassVar[str] = ""
    """What a command's `--help` says after its first sentence; Python has the whole docstring."""

    def __post_init__(self) -> None:
        for name, found in options_of(type(self)).items():
            value = getattr(self, name)
            if found.parse is not None and isinstance(value, str):
                value = found.parse(value, found.flag or flag_of(name))
                object.__setattr__(self, name, value)
            found.check(name, value)
        self.check()

    def check(self) -> None:
        """What no single field can tell. Raises UsageError."""

    @classmethod
    def former(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call in a former form, in today's words."""
        return args, kwargs

    def settings(self) -> dict[str, Any]:
        """What the record says was asked."""
        return {n: plain(getattr(self, n)) for n, o in options_of(type(self)).items() if o.record}

    def identity(self) -> dict[str, Any]:
        """What unfinished work is bound to, beside the inputs."""
        return {n: plain(getattr(self, n)) for n, o in options_of(type(self)).items() if o.identity}

    def but(self, **changes: Any) -> Any:
        """The same request with some fields other."""
        return dataclasses.replace(self, **changes)


def options_of(request: type[Request]) -> dict[str, Option]:
    """Every option of a request by its name: arguments, the verb's own, what it shares with others."""
    found = {f.name: f.metadata[_KEY] for f in dataclasses.fields(request) if _KEY in f.metadata}
    own = inspect.get_annotations(request)
    return dict(sorted(found.items(), key=lambda p: (not p[1].is_argument, p[0] not in own)))


def types_of(request: type[Request]) -> dict[str, Any]:
    """The type of every field."""
    return get_type_hints(request)


def default_of(request: type[Request], name: str) -> Any:
    """The default of a field; `dataclasses.MISSING` where it has to be given."""
    field = next(f for f in dataclasses.fields(request) if f.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def flag_of(name: str) -> str:
    """`max_tokens` -> `--max-tokens`."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return value


def joined(name: str, today: Any, former: Any) -> list[Any]:
    """What was given under an option's name and under a former one, where it may be several values.

    Raises UsageError where it is one.
    """
    if any(isinstance(each, list | tuple) for each in (today, former)):
        both = (each if isinstance(each, list | tuple) else [each] for each in (former, today))
        return [value for each in both for value in each]
    raise UsageError(f"{name} is given twice, once by its former name; give it once.")


# --- how text is read ------------------------------------------------------------------------------

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str, name: str) -> int:
    """`8MB`, `1.5GiB`, `120000` to bytes. Raises UsageError.

    >>> parse_bytes("8MB", "--bytes")
    8000000
    """
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    unit += "B" if unit in ("K", "M", "G", "T", "KI", "MI", "GI", "TI") else ""
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UsageError(f"{name} {text!r} is no size; write it like 8MB or 120000.") from None
    if not 1 <= value < math.inf:
        raise UsageError(f"{name} must be at least 1 byte, not {text!r}.")
    return int(value)


def parse_numbers(text: str, name: str) -> list[int]:
    """`0,1,-1` as numbers. Raises UsageError.

    >>> parse_numbers("0, 1,-1", "--protect")
    [0, 1, -1]
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(
            f"{name} {text!r} names no blocks; write their numbers, like 0,1,-1."
        ) from None
