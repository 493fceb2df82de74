"""Settings of a codec's own on the command line: `--beta`, `--C`, `--value-dtype`, `--set`, ..."""

from __future__ import annotations

from typing import Any

from deltafold.cli.parameters import extra_option
from deltafold.compressing.request import CompressRequest
from deltafold.errors import UsageError
from deltafold.running.request import SIZE, options_of

METHOD_SETTINGS = {
    each.name: each
    for each in (
        extra_option(
            "beta", str | None, None, "--beta", rich_help_panel=SIZE,
            help="impart: share of components dropped beforehand (0 to 0.99), or auto.",
        ),
        extra_option(
            "c", str | None, None, "--C", rich_help_panel=SIZE,
            help="impart: exponent of importance, or auto.",
        ),
        extra_option(
            "value_dtype", str | None, None, "--value-dtype", rich_help_panel=SIZE,
            help="Dtype of stored values: fp16 (default) or bf16.",
        ),
        extra_option(
            "uniform", bool, False, "--uniform", rich_help_panel=SIZE,
            help="auto: the same relative step everywhere, whatever it costs.",
        ),
        extra_option(
            "setting", list[str] | None, None, "--set", "-s", metavar="KEY=VALUE",
            rich_help_panel=SIZE, help="Any other setting of the method.",
        ),
    )
}  # fmt: skip


def with_method_settings(asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked, with the method's own settings in the field for them. Raises UsageError."""
    settings: dict[str, Any] = {}
    for name, flag in (("beta", "--beta"), ("c", "--C")):
        if (value := asked.pop(name, None)) is not None:
            settings[name] = number_or_auto(str(value), flag)
    if (value := asked.pop("value_dtype", None)) is not None:
        settings["value_dtype"] = value
    if asked.pop("uniform", False):
        settings["uniform"] = True
    for item in asked.pop("setting", None) or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item!r} is not KEY=VALUE.")
        name = key.replace("-", "_")
        if name in options_of(CompressRequest) or any(
            name in each.old for each in options_of(CompressRequest).values()
        ):
            raise UsageError(f"--set {item!r} is no setting of a method; use the option for it.")
        settings[name] = _literal(text)
    return asked | ({"method_settings": settings} if settings else {})


def number_or_auto(text: str, option: str) -> float | str:
    """A number, or `auto`. Raises UsageError."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option} must be a number or auto, not {text!r}.") from None


def _literal(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
