"""Commands made from requests: options, panels of `--help`, `--json`, a file of settings, old names."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.errors import UsageError, nearest
from deltafold.running.record import is_main_process
from deltafold.running.request import (
    PANELS,
    Option,
    Request,
    default_of,
    flag_of,
    joined,
    options_of,
    types_of,
)

Extra = Callable[[dict[str, Any]], dict[str, Any]]
"""Options that only the command line has, taken out of what is given and put into fields."""


def command(
    kind: type[Request],
    verb: str,
    show: Callable[[dict[str, Any], Any], None],
    *,
    extra: Mapping[str, inspect.Parameter] | None = None,
    fold_in: Extra | None = None,
    announce: Callable[[Any], None] | None = None,
) -> Callable[..., None]:
    """The command of a verb. `verb` is "module:function", imported when the request has been checked.

    `show(record, request)` prints what a person reads. `extra` are parameters that the request does not
    have; `fold_in` makes fields of them. `announce(request)` says what is begun.
    """

    def run(**given: Any) -> None:
        context: typer.Context = given.pop("context")
        as_json, file = given.pop("json_output"), given.pop("settings_file")
        asked = {name: value for name, value in given.items() if _is_given(context, name)}
        asked = _from_file(file, kind, extra or {}) | _today(kind, asked)
        if fold_in is not None:
            asked = fold_in(asked)
        missing = [n for n in _needed(kind) if n not in asked]
        if missing:
            raise UsageError(
                f"{_label(kind, missing[0])} is missing; see deltafold {context.info_name} --help."
            )
        request = kind(**asked)
        if announce is not None and not as_json and is_main_process():
            announce(request)
        module, _, function = verb.partition(":")
        from deltafold.cli.show import progress

        with progress() as advance:
            from deltafold.running.front import carry_out

            found = carry_out(
                request.but(progress=advance), getattr(import_module(module), function)
            )
        if not is_main_process():
            return
        if as_json:
            print(json.dumps(found))
        else:
            show(found, request)

    run.__doc__ = _words(kind)
    run.__name__ = kind.__name__.removesuffix("Request").lower()
    run.__signature__ = inspect.Signature(_parameters(kind, extra or {}))  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def taking(
    wanted: Mapping[type[Request], Sequence[str]], extra: Sequence[inspect.Parameter] = ()
) -> Callable[[Callable[..., None]], Any]:
    """For a command written by hand: it also takes these options of requests, as the dict `asked`.

    `extra` are parameters that no request has.
    """
    added = list(extra)
    for kind, names in wanted.items():
        hints, options = types_of(kind), options_of(kind)
        added += [_option(kind, n, options[n], hints[n]) for n in names]
        added += [_old(n, f, hints[n], options[n]) for n in names for f in options[n].old_flags]

    def made(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            context: typer.Context = given.pop("context")
            taken = {p.name: given.pop(p.name) for p in added}
            asked = {name: value for name, value in taken.items() if _is_given(context, name)}
            for kind in wanted:
                asked = _today(kind, asked)
            function(**given, asked=asked)

        own = inspect.signature(function, eval_str=True).parameters.values()
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "asked"]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_parameter("context", typer.Context), *kept, *added]
        )
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        return run

    return made


def _words(kind: type[Request]) -> str:
    """What `--help` says first: one sentence and the example, not what Python returns and raises."""
    parts = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part.startswith("Example:"))])


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parameters(
    kind: type[Request], extra: Mapping[str, inspect.Parameter]
) -> list[inspect.Parameter]:
    hints = types_of(kind)
    found = [_parameter("context", typer.Context)]
    options = {n: o for n, o in options_of(kind).items() if o.cli}
    for name, each in options.items():
        if each.is_argument:
            found.append(_argument(kind, name, each, hints[name]))
    for panel in PANELS:
        found += [
            _option(kind, n, o, hints[n])
            for n, o in options.items()
            if o.panel == panel and not o.is_argument
        ]
        found += [p for p in extra.values() if _panel(p) == panel]
    found += _settled()
    for name, each in options.items():
        for flag in each.old_flags:
            found.append(_old(name, flag, hints[name], each))
    return found


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def extra_option(name: str, kind: Any, default: Any, *flags: str, **said: Any) -> inspect.Parameter:
    """A parameter for `extra`."""
    return _parameter(name, Annotated[kind, typer.Option(*flags, **said)], default)


def _panel(parameter: inspect.Parameter) -> str | None:
    return getattr(typing.get_args(parameter.annotation)[1], "rich_help_panel", None)


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
    said = typer.Argument(metavar=each.metavar or name.upper(), help=each.doc)
    default = default_of(kind, name)
    if default is dataclasses.MISSING:
        return _parameter(name, Annotated[str, said])
    inner: Any = list[str] | None if _is_many(hint) else str | None
    return _parameter(name, Annotated[inner, said], default or None)


def _option(kind: type[Request], name: str, each: Option, hint: Any) -> inspect.Parameter:
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
        *flags, help=each.doc, metavar=each.metavar, rich_help_panel=each.panel, show_default=shown
    )
    return _parameter(name, Annotated[inner, said], default)


def _old(name: str, flag: str, hint: Any, each: Option) -> inspect.Parameter:
    said = typer.Option(_both_ways(flag) if _is_switch(hint) else flag, hidden=True)
    return _parameter(_old_name(name, flag), Annotated[_inner(each, hint) | None, said], None)


def _old_name(name: str, flag: str) -> str:
    return f"old__{name}__{flag.strip('-').replace('-', '_')}"


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


def _needed(kind: type[Request]) -> list[str]:
    return [n for n in options_of(kind) if default_of(kind, n) is dataclasses.MISSING]


def _label(kind: type[Request], name: str) -> str:
    each = options_of(kind)[name]
    return (each.metavar or name.upper()) if each.is_argument else (each.flag or flag_of(name))


def _today(kind: type[Request], asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked under today's names; each former name is said once."""
    for name, each in options_of(kind).items():
        for flag in each.old_flags:
            value = asked.pop(_old_name(name, flag), None)
            if value is not None:
                today = each.flag or flag_of(name)
                typer.echo(
                    f"deltafold: {flag} is called {today} now; the former name goes with the next release.",
                    err=True,
                )
                asked[name] = joined(today, asked[name], value) if name in asked else value
    return asked


def _from_file(
    path: Path | None, kind: type[Request], extra: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Settings of a YAML or TOML file. Raises UsageError."""
    if path is None:
        return {}
    try:
        if path.suffix == ".toml":
            import tomllib

            found = tomllib.loads(path.read_text(encoding="utf-8"))
        else:
            import yaml

            found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as settings ({error}).") from None
    except Exception as error:  # yaml's own
        raise UsageError(f"{path} is no YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold options by their names, like `blocks: 6`.")
    known = {n.replace("_", "-"): n for n in [*options_of(kind), *extra]}
    known |= {(o.flag or flag_of(n)).lstrip("-"): n for n, o in options_of(kind).items()}
    asked = {}
    for key, value in found.items():
        plain = str(key).replace("_", "-")
        if plain not in known:
            raise UsageError(f"{path}: there is no option {key!r}; {nearest(plain, sorted(known))}")
        asked[known[plain]] = value
    return asked


def record_place(record: str | Path | None, output: str | Path) -> str:
    """Where the record of an output is, to be shown: an address stays one."""
    from deltafold.checkpoint.store import shown
    from deltafold.running.record import record_path

    return shown(Path(record or record_path(Path(output))))
