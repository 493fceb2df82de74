"""What `merge` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from deltafold.compressing.request import Budgeted
from deltafold.errors import UsageError
from deltafold.running.common import Clustered, Scored, Seeded, Sharded
from deltafold.running.request import OUTPUT, SIZE, TEXT, WHAT, argument, asked, option

Value = Any  # a number, a gradient or a table, see `recipe.py`


def parse_value(text: str, name: str) -> Value:
    """A number, or a gradient or table as JSON. Raises UsageError."""
    try:
        return json.loads(text)
    except ValueError:
        raise UsageError(
            f'{name} {text!r} is not a number, nor JSON such as [0.2, 0.8] or {{"mlp": 0.5, '
            '"default": 1}.'
        ) from None


@asked
class MergeRequest(Budgeted, Clustered, Scored, Seeded, Sharded):
    """Merge several fine-tunes of one base into one ordinary checkpoint, or into an archive.

    `models` are folders, hub ids, archives, `Model`s with weights of their own, or a whole `Recipe`.
    Keywords that are not listed are numbers of the method's own. Returns the record: norms, cosines and
    agreement of the deltas, tensor by tensor. Raises MismatchError where the models do not fit the base;
    nothing is left under `output` then.

    Example: deltafold merge base/ math.delta sql.delta chat/ -o merged/ --method ties
    """

    base: str | Path | None = argument(
        "The base: folder or hub id. Default: the one that the archives name.",
        default=None,
        kw_only=True,
    )
    models: Sequence[Any] | Any = argument(
        "Fine-tunes of the base: archives, folders.", default=(), kw_only=False
    )
    output: str | Path = argument(
        "Folder to write.", default="", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )
    method: str = argument(
        "See docs/commands/merge.md for all.",
        default="ties", kw_only=False, flag="--method", flags=("-m",), panel=WHAT, identity=True,
    )  # fmt: skip
    config: str | Path | None = option(
        "A YAML file that says all of it; ours or mergekit's.", default=None, identity=False
    )
    sparsify: str | None = option(
        "none, magnitude, dare, della, breadcrumbs or impart. Default: the method's.", default=None
    )
    consensus: str | None = option(
        "sum, mean, ties, slerp or consensus. Default: the method's.", default=None
    )
    weight: Sequence[Value] | None = option(
        "Of each model in order, or one for all; see docs for gradients.", default=None
    )
    density: Sequence[Value] | None = option(
        "Share of each delta to keep; as --weight.", default=None
    )
    scale: Value | None = option("Factor of the merged delta.", default=None, parse=parse_value)
    tokenizer: str | None = option(
        "Whose vocabulary: the base's, all tokens of all, or that of one of the models.",
        default=None, metavar="base|union|MODEL",
    )  # fmt: skip
    search: Mapping[str, Sequence[float]] | Sequence[str] | None = option(
        "Try values of scale or density, and keep what does best.",
        default=None, metavar="NAME[=V,V,...]", identity=False, record=False,
    )  # fmt: skip
    search_on: Sequence[str | Path] = option(
        "What the search chooses by: .jsonl or text. Default: --task, --text.",
        default=(), panel=TEXT, identity=False, record=False,
    )  # fmt: skip
    texts: Sequence[str | Path] = option(
        "Text to measure perplexity on; as evaluate does.",
        default=(), panel=TEXT, flag="--text", identity=False, record=False,
    )  # fmt: skip
    as_archive: bool = option(
        "Write an archive on the base, no checkpoint.", default=False, panel=OUTPUT, identity=False
    )
    archive_method: str = option(
        "Codec of that archive.", default="auto", panel=SIZE, identity=False
    )
    calibration: str | Path | None = option(
        "For that archive; as compress takes it.",
        default=None, panel=TEXT, metavar="TEXT", identity=False,
    )  # fmt: skip
    archive_settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What else `compress` is given for that archive."""

    def check(self) -> None:
        """Raises UsageError."""
        if not str(self.output):
            raise UsageError("--output is missing; say where the merged model goes.")
        if not self.as_archive and (
            self.archive_method != "auto"
            or self.calibration is not None
            or any(value is not None for value in self.budget)
        ):
            raise UsageError("A size, a codec or calibration is for an archive: add --as-archive.")
        object.__setattr__(self, "search", _searched(self.search))

    @classmethod
    def former(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call as of before, `merge(base, recipe, output, as_archive={...})`, in today's words."""
        kwargs = dict(kwargs)
        if isinstance(kwargs.get("as_archive"), Mapping):
            options = dict(kwargs["as_archive"])
            kwargs |= {"as_archive": True, "archive_method": options.pop("method", "auto")}
            for name in ("file_ratio", "nominal_ratio", "n_bytes", "calibration"):
                if name in options:
                    kwargs[name] = options.pop(name)
            kwargs["archive_settings"] = options
        if "recipe" in kwargs or (len(args) >= 2 and hasattr(args[1], "rules")):
            warnings.warn(
                "merge(base, recipe, output) is written merge(recipe, output, base=base) now; the "
                "former order goes with the next release.",
                FutureWarning,
                stacklevel=4,
            )
            given = dict(zip(("base", "recipe", "output"), args, strict=False)) | kwargs
            return (given.pop("recipe"), given.pop("output")), given
        return args, kwargs


def _searched(given: Any) -> Mapping[str, Sequence[float]] | None:
    """`["scale=0.4,0.8", "density"]` as values by name. Raises UsageError."""
    if given is None or isinstance(given, Mapping):
        return given
    found: dict[str, list[float]] = {}
    for text in given:
        name, _, values = str(text).partition("=")
        try:
            found[name] = [float(each) for each in values.split(",") if each.strip()]
        except ValueError:
            raise UsageError(f"--search {text!r} is not like scale=0.4,0.8,1.") from None
    return found
