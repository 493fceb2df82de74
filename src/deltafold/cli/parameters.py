"""Options of requests as parameters that typer reads."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.running.request import (
    PANELS,
    Option,
    Request,
    default_of,
    flag_of,
    options_of,
    types_of,
)


def parameters(
    kind: type[Request], more: Sequence[inspect.Parameter] = ()
) -> list[inspect.Parameter]:
    """All parameters of a command, in the order of its help: arguments, then panel by panel."""
    hints = types_of(kind)
    found = [parameter("context", typer.Context)]
    options = {n: o for n, o in options_of(kind).items() if o.cli}
    fields = [each.name for each in dataclasses.fields(kind)]
    arguments = [n for n in fields if n in options and options[n].is_argument]
    found += [_argument(kind, n, options[n], hints[n]) for n in arguments]
    named = [n for n in options if n not in arguments]
    for panel in PANELS:
        found += [_option(kind, n) for n in named if options[n].panel == panel]
        found += [each for each in more if _panel(each) == panel]
    found += _settled()
    return [*found, *(each for each in more if _panel(each) is None), *_former(kind, named)]


def options_as_parameters(kind: type[Request], names: Sequence[str]) -> list[inspect.Parameter]:
    """Some options of a request, for a command that takes them beside its own."""
    return [*(_option(kind, name) for name in names), *_former(kind, names)]


def extra_option(name: str, kind: Any, default: Any, *flags: str, **said: Any) -> inspect.Parameter:
    """A parameter that no request has."""
    return parameter(name, Annotated[kind, typer.Option(*flags, **said)], default)


def no_markup(text: str) -> str:
    """A text of help in which `deltafold[compare]` is no markup."""
    return text.replace("[", "\\[")


def parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    """A keyword of a command."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def former_name(name: str, flag: str) -> str:
    """The parameter of an option's former flag."""
    return f"old__{name}__{flag.strip('-').replace('-', '_')}"


def _former(kind: type[Request], names: Sequence[str]) -> list[inspect.Parameter]:
    hints, options = types_of(kind), options_of(kind)
    return [_old(n, flag, hints[n], options[n]) for n in names for flag in options[n].old_flags]


def _panel(each: inspect.Parameter) -> str | None:
    return getattr(typing.get_args(each.annotation)[1], "rich_help_panel", None)


def _settled() -> list[inspect.Parameter]:
    """What every command has."""
    return [
        extra_option(
            "settings_file", Path | None, None, "--settings", metavar="FILE", rich_help_panel="Output",
            help="A YAML or TOML file of options, by their names; those on the command line win.",
        ),
        extra_option(
            "json_output", bool, False, "--json", rich_help_panel="Output",
            help="Print JSON and nothing else.",
        ),
    ]  # fmt: skip


def _argument(kind: type[Request], name: str, each: Option, hint: Any) -> inspect.Parameter:
    said = typer.Argument(
        metavar=each.metavar or name.upper(), help=no_markup(each.doc), show_default=False
    )
    default = default_of(kind, name)
    inner: Any = list[str] if _is_many(hint) else str
    if default is dataclasses.MISSING:
        return parameter(name, Annotated[inner, said])
    return parameter(name, Annotated[inner | None, said], default or None)


def _option(kind: type[Request], name: str) -> inspect.Parameter:
    each, hint = options_of(kind)[name], types_of(kind)[name]
    inner, default = _inner(each, hint), default_of(kind, name)
    shown: Any = each.shown_default if each.shown_default is not None else default is not None
    if default is dataclasses.MISSING or default in ((), []):
        default, shown = None, False
    if each.parse is not None and default is not None:
        default = each.shown_default or str(default)
    flag = each.flag or flag_of(name)
    flags = [flag, *each.flags]
    if _is_switch(hint):
        shown = bool(default)
        flags = [flag if default is False else _both_ways(flag), *each.flags]
    said = typer.Option(
        *flags,
        help=no_markup(each.doc),
        metavar=each.metavar,
        rich_help_panel=each.panel,
        show_default=shown,
    )
    return parameter(name, Annotated[inner, said], default)


def _old(name: str, flag: str, hint: Any, each: Option) -> inspect.Parameter:
    said = typer.Option(_both_ways(flag) if _is_switch(hint) else flag, hidden=True)
    return parameter(former_name(name, flag), Annotated[_inner(each, hint) | None, said], None)


def _both_ways(flag: str) -> str:
    """A switch that can also be turned off."""
    return f"{flag}/--no-{flag[2:]}"


def _is_switch(hint: Any) -> bool:
    return bool in (hint, *typing.get_args(hint))


def _is_many(hint: Any) -> bool:
    origins = [typing.get_origin(t) for t in (hint, *typing.get_args(hint))]
    return any(o in (list, tuple, collections.abc.Sequence) for o in origins)


def _inner(each: Option, hint: Any) -> Any:
    """The type that typer reads: what is parsed comes as text."""
    parts = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    optional = type(None) in parts
    if each.parse is not None:
        return str | None
    if _is_many(hint):
        return list[str] | None
    for plain in (bool, int, float):
        if plain in parts and str not in parts:
            return plain | None if optional else plain
    return str | None if optional else str
