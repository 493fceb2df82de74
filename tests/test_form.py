"""The form of the code that no tool checks: how much a function may ask for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import deltafold

SOURCE = Path(deltafold.__file__).parent
MOST_PARAMETERS = 8


def functions() -> Iterator[tuple[str, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(module, name, definition) of every function and method of the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(["deltafold", *path.relative_to(SOURCE).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module.removesuffix(".__init__"), node.name, node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What has to be thought of at a call: all but `self` and `cls`."""
    asked = function.args
    found = [*asked.posonlyargs, *asked.args, *asked.kwonlyargs, asked.vararg, asked.kwarg]
    names = [each.arg for each in found if each is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def is_front(module: str, name: str) -> bool:
    """True for a public verb, whose keywords are its options."""
    return name in deltafold.__all__ and getattr(deltafold, name).__module__ == module


def test_a_function_asks_for_few_things() -> None:
    counted = [(module, name, len(parameters(node))) for module, name, node in functions()]
    assert len(counted) > 1000  # the walk has found the package
    too_many = [
        f"{module}.{name} has {number}"
        for module, name, number in counted
        if number > MOST_PARAMETERS and not is_front(module, name)
    ]
    assert too_many == []


def test_parameters_are_counted() -> None:
    source = "def f(self, a, /, b, *c, d=1, **e): ..."
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef) and sorted(parameters(node)) == [*"abcde"]
    assert is_front("deltafold.exporting.load", "load") and not is_front("deltafold.x", "load")
