"""Manifests edited by someone who knows the format: the checksum is made to fit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from refusals import edit_manifest

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 1 << 31, 1 << 49, 1 << 62, 10**30, 0.5, -0.0, 1e308, "", "x",
    "../x", "/etc/passwd", "model.safetensors", "\x00", "[red]", "\ud800", "a" * 300, [], {}, [[]], {"a": 1},
    [0, 1], "lossless", "lowrank", "skip", "base", "none", "0" * 32, "f" * 16, "BF16", "F8_E4M3",
)  # fmt: skip


def edit(archive: Path, rng: random.Random) -> str:
    """Change one to three things of a manifest, anywhere in it; says what."""
    said: list[str] = []

    def change(raw: dict[str, Any]) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            holder, key = rng.choice(list(_places(raw)))
            way = rng.choice(("value", "value", "value", "gone", "twice", "number", "moved"))
            said.append(_do(holder, key, way, rng, raw))

    edit_manifest(archive, change)
    return "; ".join(said)


def _do(holder: Any, key: Any, way: str, rng: random.Random, raw: dict[str, Any]) -> str:
    if isinstance(holder, list) and key >= len(holder):  # an edit before has made it shorter
        return "nothing"
    if isinstance(holder, dict) and key not in holder:
        return "nothing"
    old = holder[key]
    if way == "gone":
        del holder[key]
    elif way == "twice" and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(old)))
    elif way == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = old + rng.choice((-1, 1, 1 << 20))
    elif way == "moved":
        alike = [o[p] for o, p in _places(raw) if type(o[p]) is type(old) and o[p] != old]
        holder[key] = json.loads(json.dumps(rng.choice(alike or [old])))
    else:
        alike = [each for each in VALUES if type(each) is type(old)]
        holder[key] = rng.choice(alike if alike and rng.random() < 0.7 else VALUES)
    return f"{key}: {str(old)[:40]!r}, {way}"


def _places(value: Any) -> Any:
    """(holder, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
