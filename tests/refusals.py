"""What every refusal of bad input must look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltafold.archive.manifest import MANIFEST_FILE, sealed
from deltafold.errors import DeltafoldError


def refused(kind: type[DeltafoldError], action: Callable[[], object], *names: str) -> str:
    """`action` must raise exactly `kind` with one sentence that holds all `names`; returns it."""
    with pytest.raises(DeltafoldError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert message.endswith(".")
    for name in names:
        assert name in message
    return message


def nothing_left(output: Path) -> None:
    """No output, no unfinished work, no record under this name."""
    assert sorted(output.parent.glob(f"{output.name}*")) == []


def edit_manifest(archive: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit `delta.json` as someone would who knows the format: the checksum is made to fit."""
    path = archive / MANIFEST_FILE
    raw = json.loads(path.read_text())
    del raw["checksum"]
    change(raw)
    path.write_text(sealed(json.dumps(raw)[:-1]))


def tensor_entry(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """The manifest's entry of one tensor."""
    return next(entry for entry in raw["tensors"] if entry["name"] == name)
