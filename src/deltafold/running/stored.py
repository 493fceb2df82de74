"""Verbs whose output may be an address in an object store, like `s3://bucket/math.delta`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from deltafold.checkpoint.store import address_of, is_address, output_of
from deltafold.running.record import Record, record_path, write_record

P = ParamSpec("P")


def storable(verb: Callable[P, Record]) -> Callable[P, Record]:
    """The verb, which makes an output with an address in the cache and stores it when it is whole.

    The record speaks of the address; it lies beside it, or where `record` says.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def stored(*args: P.args, **kwargs: P.kwargs) -> Record:
        bound = signature.bind(*args, **kwargs)
        output = bound.arguments["output"]
        if not is_address(output):
            return verb(*args, **kwargs)
        given = bound.arguments | bound.arguments.get("settings", {})
        with output_of(output, bool(given.get("overwrite"))) as made:
            bound.arguments["output"] = made
            result = verb(*bound.args, **bound.kwargs)
            for key in ("output", "archive"):
                if result.get(key) == str(made):
                    result[key] = address_of(output)
            if made.exists():
                write_record(result, Path(given.get("record") or record_path(made)))
        return result

    return stored
