"""The Python front of a verb, made from its request: plain keywords, with types, defaults and docs."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from deltafold.checkpoint.store import address_of, is_address, output_of
from deltafold.errors import UsageError, nearest
from deltafold.foreign import in_sentences
from deltafold.running.common import Running
from deltafold.running.devices import computing
from deltafold.running.neutral import as_at_start
from deltafold.running.record import record_path, write_afterwards
from deltafold.running.request import Request, default_of, flag_of, joined, options_of

P = ParamSpec("P")
T = TypeVar("T")
EXTRAS = "method_settings"
"""The field that takes what keywords are left: the settings of a method's own."""


def front(name: str, request: Callable[P, Request], run: Callable[[Any], T]) -> Callable[P, T]:
    """A function `name` that takes the fields of `request` and carries out what they ask.

    To a type checker it has the signature of the request; to `inspect.signature` and `help` as well.
    """
    assert isinstance(request, type)
    kind: type[Request] = request

    def verb(*args: Any, **kwargs: Any) -> T:
        return carry_out(made(kind, name, args, kwargs), run)

    verb.__name__ = verb.__qualname__ = name
    verb.__module__ = run.__module__
    verb.__doc__ = docs_of(kind)
    gives = inspect.get_annotations(run).get("return", "Record")
    verb.__signature__ = signature_of(kind).replace(return_annotation=gives)  # type: ignore[attr-defined]
    verb.request = kind  # type: ignore[attr-defined]
    return verb


def made(kind: type[Request], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    """The request of a call. Raises UsageError for a keyword that is not known, with the nearest."""
    args, kwargs = kind.former(args, kwargs)
    given = _renamed(kind, kwargs)
    fields = {f.name for f in dataclasses.fields(kind) if _in_python(kind, f.name)}
    left = {key: given.pop(key) for key in [*given] if key not in fields}
    if EXTRAS in fields:
        given[EXTRAS] = {**given.get(EXTRAS, {}), **left}
    elif left:
        raise UsageError(
            f"{name} takes no {next(iter(left))!r}; {nearest(next(iter(left)), sorted(fields))}"
        )
    try:
        return kind(*args, **given)
    except TypeError as error:  # too many positional arguments, or one that is missing
        raise TypeError(str(error).replace(f"{kind.__name__}.__init__", name)) from None


def _renamed(kind: type[Request], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords under today's names; a former one is said once."""
    today = {old: name for name, found in options_of(kind).items() for old in found.old}
    given: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key in today:
            warnings.warn(
                f"{key} is called {today[key]} now; the former name goes with the next release.",
                FutureWarning,
                stacklevel=4,
            )
        name = today.get(key, key)
        given[name] = joined(name, value, given[name]) if name in given else value
    return given


def carry_out(request: Any, run: Callable[[Any], T]) -> T:
    """Run a request on its device, in a torch that is as at its start.

    An output with an address in a store is stored when it is whole.

    The record of such an output speaks of the address; it lies beside it, or where `record` says.
    """
    device = request.device if isinstance(request, Running) else None
    with in_sentences(), as_at_start(), computing(device):
        output = getattr(request, "output", None)
        if output is None or not is_address(output):
            return run(request)
        with output_of(output, bool(request.overwrite)) as local:
            result = run(request.but(output=local))
            assert isinstance(result, dict)  # the record of what was written
            for key in ("output", "archive"):
                if result.get(key) == str(local):
                    result[key] = address_of(output)
            if local.exists():
                write_afterwards(result, Path(request.record or record_path(local)), local)
        return result


def signature_of(kind: type[Request]) -> inspect.Signature:
    """The fields as parameters: positional ones first, then keywords, then a method's own settings."""
    placed: list[inspect.Parameter] = []
    keywords: list[inspect.Parameter] = []
    for field in dataclasses.fields(kind):
        if field.name == EXTRAS or not _in_python(kind, field.name):
            continue
        default = default_of(kind, field.name)
        parameter = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY
            if field.kw_only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
            annotation=field.type,
        )
        (keywords if field.kw_only else placed).append(parameter)
    more = []
    if any(field.name == EXTRAS for field in dataclasses.fields(kind)):
        more = [inspect.Parameter(EXTRAS, inspect.Parameter.VAR_KEYWORD, annotation="Any")]
    return inspect.Signature([*placed, *keywords, *more])


def _in_python(kind: type[Request], name: str) -> bool:
    """False for what only the command line takes."""
    found = options_of(kind).get(name)
    return found is None or found.python


def docs_of(kind: type[Request]) -> str:
    """The request's own words, then a line for each option."""
    text, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    lines = [text, "", "Args:"]
    for name, found in options_of(kind).items():
        if found.python:
            lines.append(f"    {name}: {found.doc}")
    return "\n".join([*lines, "", rest]).rstrip() + "\n"


def options_table(kind: type[Request], public: bool = True) -> str:
    """The options as a Markdown table for a page of docs, panel by panel.

    `public`: Python takes them too, under the names that are shown then.
    """
    from deltafold.running.request import PANELS

    rows = ["| option | in Python | default | |", "|---|---|---|---|"]
    if not public:
        rows = ["| option | default | |", "|---|---|---|"]
    found = options_of(kind)
    for panel in PANELS:
        for name, each in found.items():
            if each.panel != panel or each.is_argument or not each.cli:
                continue
            flags = ", ".join(f"`{flag}`" for flag in (each.flag or flag_of(name), *each.flags))
            ours = (f"`{name}`" if each.python else "") + " | " if public else ""
            rows.append(f"| {flags} | {ours}{shown_default(kind, name)} | {each.doc} |")
    return "\n".join(rows) + "\n"


def shown_default(kind: type[Request], name: str) -> str:
    """A default as a page shows it; nothing where there is none."""
    said, value = options_of(kind)[name].shown_default, default_of(kind, name)
    if said is not None:
        return said
    if value is dataclasses.MISSING or value is None or value is False or value in ((), [], {}):
        return ""
    if value is True:
        return "yes"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"
