"""A checkpoint opened once without weights, as transformers would open it, before it gets its name.

The weights' headers stand in for the weights: transformers builds the model of the config, puts together
what each parameter is made of, and says what is lacking, left over, or of another shape.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import class_of, config_of, quiet, unused
from deltafold.calibration.wiring import wire
from deltafold.checkpoint import DTYPES, Checkpoint
from deltafold.errors import CheckpointError, DeltafoldError
from deltafold.foreign import first_line, shortage

NAMED = 20
"""As many problems are named in a record."""


@dataclass(frozen=True)
class Opening:
    """What came of it. `unknown` says why transformers could not be asked; `problems` what it found."""

    unknown: str | None = None
    problems: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """The row of a record."""
        return {
            "opened": self.unknown is None and not self.problems,
            "why_not": self.unknown,
            "problems": list(self.problems[:NAMED]),
        }

    def beyond(self, before: Opening) -> tuple[str, ...]:
        """Problems of a kind that `before` has not; numbers of blocks and sizes do not matter."""
        known = {_kind(each) for each in before.problems}
        return tuple(each for each in self.problems if _kind(each) not in known)


def _kind(problem: str) -> str:
    return re.sub(r"\d+", "#", problem)


def open_bare(folder: Path, kind: Any = None) -> Opening:
    """Open a folder's checkpoint without weights. `kind` is its class, if not one of transformers.

    Never fails for what transformers does not know: that is said.
    """
    try:
        with Checkpoint(folder) as stored:
            config, tensors = stored.config(), stored.own_tensors
            state = {
                name: torch.empty(
                    tuple(info.shape), dtype=DTYPES.get(info.dtype, torch.float32), device="meta"
                )
                for name, info in tensors.items()
            }
    except DeltafoldError as error:
        if error.passing:
            raise
        return Opening(problems=(str(error),))
    if not config:
        return Opening("there is no config.json")
    if "quantization_config" in config:
        return Opening("weights are quantised")
    try:
        read = config_of(folder, "the model")
        kind = kind or class_of(read, "the model", causal=False)
    except DeltafoldError as error:
        if error.passing:
            raise
        return Opening(str(error).rstrip("."))
    return _opened(kind, read, state)


def _opened(kind: Any, config: Any, state: dict[str, torch.Tensor]) -> Opening:
    from transformers.utils import is_accelerate_available

    ask = _by_loading if is_accelerate_available() else _by_rules
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Opening(problems=tuple(ask(kind, config, state)))
    except ImportError as error:
        return Opening(f"a package is missing ({first_line(error)})")
    except Exception as error:  # of any part of transformers
        if (lacking := shortage(error)) is not None:
            raise lacking from error
        return Opening(problems=(f"it does not open ({first_line(error)})",))


def _by_loading(kind: Any, config: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """What transformers itself says; it loads without weights only where accelerate is there."""
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    shapes = [_misshapen(name, stored, wanted) for name, stored, wanted in info["mismatched_keys"]]
    errors = [f"it does not open ({each})" for each in _lines(info.get("error_msgs"))]
    return _problems(info["missing_keys"], unused(model, info["unexpected_keys"]), shapes) + errors


def _by_rules(kind: Any, config: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """The same by the rules of which tensors a parameter is made of."""
    with torch.device("meta"):
        model = kind._from_config(config)
    groups, wanted = wire(model, state), model.state_dict()
    used = {name for group in groups.values() for name in group.names}
    missing = [
        name for name in wanted
        if name not in groups and not _ignored(name, model, "_keys_to_ignore_on_load_missing")
    ]  # fmt: skip
    unexpected = [
        name for name in state
        if name not in used and not _ignored(name, model, "_keys_to_ignore_on_load_unexpected")
    ]  # fmt: skip
    shapes = []
    for group in {id(group): group for group in groups.values()}.values():
        for name, made in group.make(model, state.__getitem__).items():
            if name in wanted and made.shape != wanted[name].shape:
                shapes.append(_misshapen(name, made.shape, wanted[name].shape))
    return _problems(missing, unused(model, unexpected), shapes)


def _ignored(name: str, model: Any, patterns: str) -> bool:
    return any(re.search(each, name) for each in getattr(model, patterns, None) or ())


def _misshapen(name: str, stored: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} is {list(stored)} and should be {list(wanted)}"


def _problems(
    missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]
) -> list[str]:
    found = [f"{name} is missing" for name in sorted(missing)]
    found += [f"{name} belongs to no part of the model" for name in sorted(unexpected)]
    return found + sorted(shapes)


def _lines(messages: Any) -> list[str]:
    return [str(each).strip().splitlines()[0] for each in messages or [] if str(each).strip()]


def check_opens(
    folder: Path, label: str, before: Path | None = None, kind: Any = None
) -> dict[str, Any]:
    """Open what was written for `label`; the row of the record.

    Raises CheckpointError for problems that the checkpoint `before`, which it was made of, has not.
    """
    made = open_bare(folder, kind)
    if made.unknown and before is not None and not open_bare(before).unknown:
        made = Opening(problems=(made.unknown,))
    if made.problems:
        known = Opening() if before is None else open_bare(before)
        if new := made.beyond(known):
            more = f" ({len(new)} such faults in all)" if len(new) > 1 else ""
            raise CheckpointError(
                f"The model made from {label} does not open: {new[0]}{more}; this command cannot make "
                "a sound one of this kind of model."
            )
    return made.to_record()
