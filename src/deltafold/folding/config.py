"""The config of what is left: found by building both models without weights and comparing blocks.

Where the config can be read in two ways (a list of values or of numbers, a count of the first blocks or
of the last), the reading is taken under which every kept block is what it was. Where there is none, the
fold is refused and the setting named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltafold.blocks.configs import Config, readings, shortened, text_config
from deltafold.blocks.kinds import Difference, differences
from deltafold.calibration.building import build, find_blocks
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.json_files import CONFIG_FILE
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import DeltafoldError, MismatchError
from deltafold.folding.grown import Grown, grown_tensors


@dataclass(frozen=True)
class Shortened:
    """A config for the kept blocks. `unchecked` says why it could not be compared, if it could not.

    `grown` are the tensors outside of the blocks of which only some parts are left.
    """

    config: Config
    unchecked: str | None = None
    grown: Mapping[str, Grown] = field(default_factory=dict)


class _Whole:
    """The whole model without weights, and what a config makes of its kept blocks."""

    def __init__(self, checkpoint: Checkpoint, kept: Sequence[int], scratch: Path):
        self.model = build(checkpoint.path, causal=False)
        _, self.names = find_blocks(self.model, checkpoint.path)
        self.kept, self.folder = kept, scratch / "config"
        self.derived: Config = self.model.config.get_text_config(decoder=True).to_dict()

    def differences(self, config: Config) -> list[Difference] | DeltafoldError:
        """What would not be as it was; the error where no model can be built of the config."""
        put_config(config, self.folder)
        try:
            short = build(self.folder, causal=False)
            find_blocks(short, self.folder)
            return differences(self.model, short, self.names, self.kept)
        except DeltafoldError as error:
            return error


def folded_config(checkpoint: Checkpoint, kept: Sequence[int], scratch: Path) -> Shortened:
    """The config under which the blocks `kept` are what they were. Raises MismatchError by name.

    `scratch` is a folder for what is tried.
    """
    raw = dict(checkpoint.config())
    try:
        whole = _Whole(checkpoint, kept, scratch)
    except DeltafoldError as error:  # a model that transformers does not know, or not as this
        return Shortened(shortened(raw, kept), str(error))
    best: tuple[Config, list[Difference]] | None = None
    failure: DeltafoldError | None = None
    for config in (shortened(raw, kept, whole.derived), shortened(raw, kept)):
        found = whole.differences(config)
        if isinstance(found, DeltafoldError):
            failure = failure or found
        elif best is None or len(found) < len(best[1]):
            best = config, found
    if best is None:
        raise MismatchError(
            f"Blocks {numbers_in_words(kept)} of {checkpoint.label} cannot be a model of their own: "
            + str(failure).replace(str(whole.folder), "what is left")
        )
    config, found = best
    while found:
        better = _better(whole, raw, config, found)
        if better is None:
            raise _refusal(checkpoint.label, kept, found)
        config, found = better
    put_config(config, whole.folder)
    short = build(whole.folder, causal=False)
    grown = grown_tensors(whole.model, short, checkpoint, len(whole.names), kept)
    return Shortened(config, None, grown)


def _better(
    whole: _Whole, raw: Config, config: Config, found: list[Difference]
) -> tuple[Config, list[Difference]] | None:
    """Another reading of one key under which fewer settings differ."""
    known = deepcopy(raw)
    inside = text_config(known)
    inside |= {key: value for key, value in whole.derived.items() if inside.get(key) is None}
    for other in [*readings(known, config, whole.kept), *_scaled(whole, config, found)]:
        made = whole.differences(other)
        if not isinstance(made, DeltafoldError) and len(made) < len(found):
            return other, made
    return None


def _scaled(whole: _Whole, config: Config, found: list[Difference]) -> Iterator[Config]:
    """Configs in which a scale that is divided by the depth has its old value again."""
    old, new = found[0].old, found[0].new
    if not (isinstance(old, float) and isinstance(new, float) and new):
        return
    for key, value in whole.derived.items():
        if isinstance(value, float) and value:
            other = deepcopy(config)
            text_config(other)[key] = value * old / new
            yield other


def put_config(config: Config, folder: Path) -> None:
    """Write config.json into a folder, which is made."""

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_bytes(config_bytes(config))

    guard_storage(folder, write)


def config_bytes(config: Config) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _refusal(label: str, kept: Sequence[int], found: list[Difference]) -> MismatchError:
    more = f" ({len(found) - 1} more differ)" if len(found) > 1 else ""
    return MismatchError(
        f"With blocks {numbers_in_words(kept)} of {label}, {found[0]}{more}; this depends on a "
        "block's number, or on how many there are, and no config can keep it: remove the last blocks "
        "instead, or fold another model."
    )


def numbers_in_words(kept: Sequence[int]) -> str:
    """`0, 1, 4`"""
    return ", ".join(map(str, kept))


def narrowed(config: Config, derived: dict[str, Any], window: int) -> Config:
    """The config with every window over the text this narrow, to be seen at work on a short text."""
    made = deepcopy(config)
    inside = text_config(made)
    for key, value in {**derived, **inside}.items():
        if key in _WINDOWS and isinstance(value, int) and value > window:
            inside[key] = window
    return made


_WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size",
            "local_attention", "sliding_window_size")  # fmt: skip
