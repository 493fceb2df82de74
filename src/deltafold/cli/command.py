"""Commands made from requests: parameters, panels of `--help`, `--json`, a file of settings, old names."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from deltafold.cli.parameters import former_name, no_markup, options_as_parameters, parameters
from deltafold.errors import UsageError, nearest
from deltafold.foreign import blamed, first_line
from deltafold.running.record import as_json, is_main_process
from deltafold.running.request import Request, default_of, flag_of, joined, options_of


@dataclass(frozen=True)
class Extras:
    """What a command takes that its request has no fields for.

    `options` names fields of other requests, `parameters` has what no request knows. `fold_in` makes
    fields of what was given.
    """

    fold_in: Callable[[dict[str, Any]], dict[str, Any]]
    parameters: Sequence[inspect.Parameter] = ()
    options: Mapping[type[Request], Sequence[str]] = field(default_factory=dict)

    def all_parameters(self) -> list[inspect.Parameter]:
        """As typer reads them."""
        found = [options_as_parameters(kind, names) for kind, names in self.options.items()]
        return [*(each for some in found for each in some), *self.parameters]

    def names(self) -> dict[str, str]:
        """What a file of settings may call them -> their names."""
        known = {each.name.replace("_", "-"): each.name for each in self.parameters}
        for kind, names in self.options.items():
            known |= {key: n for key, n in names_in_files(kind).items() if n in names}
        return known


NOTHING = Extras(lambda asked: asked)


@contextlib.contextmanager
def progress_bar(kind: type[Request]) -> Iterator[dict[str, Any]]:
    """The field `progress` of a request that has one, as a bar for each stage."""
    from deltafold.cli.show import progress

    if "progress" not in options_of(kind):
        yield {}
        return
    with progress() as advance:
        yield {"progress": advance}


def command(
    kind: type[Request],
    verb: str,
    show: Callable[[Any, Any], None],
    *,
    extras: Extras = NOTHING,
    announce: Callable[[Any], None] | None = None,
    watch: Callable[
        [type[Request]], contextlib.AbstractContextManager[dict[str, Any]]
    ] = progress_bar,
    plain: Callable[[Any], Any] = lambda found: found,
    after: Callable[[Any, Any], None] | None = None,
) -> Callable[..., None]:
    """The command of a verb. `verb` is "module:function", imported when the request has been checked.

    `show(found, request)` prints what a person reads; `plain(found)` is what `--json` prints.
    `announce(request)` says what is begun, `watch` gives the fields that tell how far it is, and
    `after(found, request)` goes on once all is printed.
    """  # fmt: skip

    def run(**given: Any) -> None:
        context: typer.Context = given.pop("context")
        only_json, file = given.pop("json_output"), given.pop("settings_file")
        asked = {name: value for name, value in given.items() if _is_given(context, name)}
        for each in (kind, *extras.options):
            asked = _today(each, asked)
        asked = extras.fold_in(_from_file(file, kind, extras) | asked)
        missing = [n for n in _needed(kind) if n not in asked]
        if missing:
            raise UsageError(
                f"{_label(kind, missing[0])} is missing; see deltafold {context.info_name} --help."
            )
        request = kind(**asked)
        if announce is not None and not only_json and is_main_process():
            announce(request)
        module, _, function = verb.partition(":")
        with watch(kind) as told:
            from deltafold.running.front import carry_out

            found = carry_out(request.but(**told), getattr(import_module(module), function))
        if not is_main_process():
            return
        if only_json:
            print(as_json(plain(found)), flush=True)
        else:
            show(found, request)
        if after is not None:
            after(found, request)

    run.__doc__ = _words(kind)
    run.__name__ = kind.__name__.removesuffix("Request").lower()
    run.request = kind  # type: ignore[attr-defined]
    taken = parameters(kind, extras.all_parameters())
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in taken}
    return run


def _words(kind: type[Request]) -> str:
    """What `--help` says first: one sentence and the example, not what Python returns and raises."""
    parts = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    said = [
        parts[0],
        *filter(None, [kind.more_help]),
        *(part for part in parts[1:] if part.startswith("Example:")),
    ]
    return no_markup("\n\n".join(said))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _needed(kind: type[Request]) -> list[str]:
    return [n for n in options_of(kind) if default_of(kind, n) is dataclasses.MISSING]


def _label(kind: type[Request], name: str) -> str:
    each = options_of(kind)[name]
    return (each.metavar or name.upper()) if each.is_argument else (each.flag or flag_of(name))


def _today(kind: type[Request], asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked under today's names; each former name is said once."""
    for name, each in options_of(kind).items():
        for flag in each.old_flags:
            value = asked.pop(former_name(name, flag), None)
            if value is not None:
                today = each.flag or flag_of(name)
                typer.echo(
                    f"deltafold: {flag} is called {today} now; the former name goes with the next release.",
                    err=True,
                )
                asked[name] = joined(today, asked[name], value) if name in asked else value
    return asked


def _from_file(path: Path | None, kind: type[Request], extras: Extras) -> dict[str, Any]:
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
        raise blamed(error, UsageError(f"{path} cannot be read as settings ({error}).")) from None
    except Exception as error:  # yaml's own
        raise blamed(error, UsageError(f"{path} is no YAML ({first_line(error)}).")) from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold options by their names, like `blocks: 6`.")
    known = extras.names() | names_in_files(kind)
    asked = {}
    for key, value in found.items():
        plain = str(key).replace("_", "-")
        if plain not in known:
            raise UsageError(f"{path}: there is no option {key!r}; {nearest(plain, sorted(known))}")
        asked[known[plain]] = value
    return asked


def names_in_files(kind: type[Request]) -> dict[str, str]:
    """What a file of settings may call an option -> its name: as in Python, and as its flag."""
    options = {name: each for name, each in options_of(kind).items() if each.cli}
    return {name.replace("_", "-"): name for name in options} | {
        (each.flag or flag_of(name)).lstrip("-"): name for name, each in options.items()
    }


def record_place(record: str | Path | None, output: str | Path) -> str:
    """Where the record of an output is, to be shown: an address stays one."""
    from deltafold.checkpoint.store import shown
    from deltafold.running.record import record_path

    return shown(Path(record or record_path(Path(output))))
