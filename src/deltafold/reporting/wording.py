"""Values of a record in words: machines, settings, anything with a unit in its name."""

from __future__ import annotations

from typing import Any

from deltafold.reporting.records import KnownRecord
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    number_text,
    percent_text,
    ratio_text,
    seconds_text,
)

_UNITS = (
    ("_bytes", bytes_text),
    ("seconds", seconds_text),
    ("_ratio", ratio_text),
    ("_share", percent_text),
)


def described(key: str, value: Any) -> str:
    """A value as text; the end of its key tells the unit."""
    match value:
        case None | "" | []:
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int() | float():
            show = next((show for end, show in _UNITS if key.endswith(end)), None)
            if show is not None:
                return show(value)
            return str(value) if isinstance(value, int) else number_text(value)
        case dict():
            return ", ".join(f"{name} {described(name, inner)}" for name, inner in value.items())
        case list() if all(isinstance(item, str | int | float) for item in value):
            return ", ".join(map(str, value)) if len(value) <= 8 else f"{len(value)} entries"
        case list():
            return f"{len(value)} entries"
    return str(value)


def machine_text(machine: dict[str, Any]) -> str:
    """The machine in one line: processor, cores, memory, then versions."""
    known = dict(machine)
    parts = [str(known.pop("cpu", None) or "processor not recorded")]
    if (cores := known.pop("cores", None)) is not None:
        parts.append(f"{cores} cores")
    if (memory_bytes := known.pop("memory_bytes", None)) is not None:
        parts.append(f"{bytes_text(memory_bytes)} of memory")
    parts += [f"{name} {described(name, value)}" for name, value in known.items() if value]
    return ", ".join(parts)


def run_note(record: KnownRecord) -> str:
    """Seconds, peak memory and machine of a run, in one sentence."""
    return (
        f"Took {seconds_text(record.seconds)}, peak memory {bytes_text(record.peak_memory_bytes)}, "
        f"on {machine_text(record.machine)}."
    )
