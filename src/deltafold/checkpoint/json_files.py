"""JSON objects that come with a checkpoint, read with one sentence for whatever else lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltafold.errors import CheckpointError
from deltafold.foreign import first_line, unread

CONFIG_FILE = "config.json"


def parse_object(data: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises CheckpointError, which calls it `what`."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise CheckpointError(
            f"{what} cannot be read: it is nested too deeply; put a proper one in its place."
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{what} cannot be read: it is not valid JSON ({first_line(error)}); put a proper one in its place."
        ) from None
    if not isinstance(found, dict):
        held = {list: "a list", type(None): "null", str: "a text", bool: "a truth value"}
        raise CheckpointError(
            f"{what} cannot be read: it holds {held.get(type(found), 'a number')} where settings by "
            "name belong; put a proper one in its place."
        )
    return found


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file. Raises CheckpointError."""
    try:
        return parse_object(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unread(error, path, CheckpointError) from None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; empty if there is none. Raises CheckpointError."""
    return read_object(folder / CONFIG_FILE) or {}
