"""Docstrings of what takes or gives tensors tell their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COPIED = "composed/modeling.py"
"""Stored beside the weights of every model that it loads: a word changed there is another byte."""
SOURCE = Path(__file__).parent.parent / "src" / "deltafold"

WORD = (
    r"(?:\.\.\.|\.\.|[a-zA-Z]|[1-3]|in|out|rank|ranks|rows?|columns?|width|vocabulary|count|values?|"
    r"tokens|targets|samples|texts|groups|models|units?|heads|experts|size|bytes|elements|components)"
)
SIZE = rf"(?:stop - start|last - first|\d*{WORD}(?: ?[-+*/] ?(?:{WORD}|\d+))?)"
SHAPE = re.compile(
    rf"\({SIZE}(?:, ?{SIZE})+\)|\[{SIZE}(?:, ?{SIZE})+\]"  # (o, i), [rows, width]
    rf"|\({SIZE},\)"  # (n,)
    rf"|\b{SIZE} x {SIZE}\b"  # o x r
    r"|\b(?:any|one|same|equal|its|their|stored|original) (?:dtypes? and )?shapes?\b"
    r"|\bscalar|\b0-dimensional|\bbroadcast"
)


@dataclass(frozen=True)
class Place:
    """A function or method of the package that others may call."""

    module: str
    holder: str  # its class
    node: ast.FunctionDef

    def __str__(self) -> str:
        name = f"{self.holder}.{self.node.name}" if self.holder else self.node.name
        return f"{self.module}:{self.node.lineno} {name}"


TREES = {
    str(path.relative_to(SOURCE)): ast.parse(path.read_text())
    for path in sorted(SOURCE.rglob("*.py"))
}
CLASSES = [
    (module, node)
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
]


def tables() -> dict[tuple[str, str], str]:
    """(module, name) of what modules call their tuples and tables of tensors."""
    found = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                told = without_functions(ast.unparse(node.value).strip("'\""))
                if re.match(r"[\w.]+\[.*torch\.Tensor", told):
                    found[module, name] = told
    return found


def without_functions(annotation: str) -> str:
    """An annotation less what it says of functions: those have docstrings of their own."""
    return re.sub(r"Callable\[\[[^\]]*\], .*\]", "", annotation)


def words_of(module: str) -> re.Pattern[str]:
    """What stands for tensors in a module: `torch.Tensor`, and tables made here or imported."""
    known = tables()
    names = {name for where, name in known if where == module}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            path = node.module.removeprefix("deltafold.").replace(".", "/")
            for each in node.names:
                if (f"{path}.py", each.name) in known or (
                    f"{path}/__init__.py",
                    each.name,
                ) in known:
                    names.add(each.asname or each.name)
    return re.compile("|".join([r"torch\.Tensor", *(rf"\b{name}\b" for name in sorted(names))]))


def functions() -> Iterator[Place]:
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                yield Place(module, "", node)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from (
                    Place(module, node.name, each)
                    for each in node.body
                    if isinstance(each, ast.FunctionDef)
                )


def with_tensors() -> list[Place]:
    """Those whose names are public and that take or give tensors, by their annotations."""
    words = {module: words_of(module) for module in TREES}
    found = []
    for place in functions():
        arguments = place.node.args
        each = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        types = [argument.annotation for argument in each] + [place.node.returns]
        told = " ".join(without_functions(ast.unparse(one)) for one in types if one is not None)
        public = not place.node.name.startswith("_") and place.module != COPIED
        if public and words[place.module].search(told):
            found.append(place)
    return found


def docstring(place: Place) -> str:
    """Its own, or that of the method of a base class which it fills in."""
    own = ast.get_docstring(place.node)
    return own or inherited(place.module, place.holder, place.node.name)


def inherited(module: str, holder: str, name: str) -> str:
    """What the nearest base class of a class says of a method."""
    for node in (each for where, each in CLASSES if (where, each.name) == (module, holder)):
        for base in (ast.unparse(each).split("[")[0] for each in node.bases):
            above = [each for each in CLASSES if each[1].name == base]
            above.sort(key=lambda each: each[0] != module)  # of one name, that of the same module
            for where, each in above[:1]:
                methods = [
                    m for m in each.body if isinstance(m, ast.FunctionDef) and m.name == name
                ]
                told = ast.get_docstring(methods[0]) if methods else None
                if told := told or inherited(where, base, name):
                    return told
    return ""


def test_docstrings_tell_the_shapes_of_tensors() -> None:
    places = with_tensors()
    assert len(places) > 200  # else the test looks past what it is for
    silent = [str(place) for place in places if not SHAPE.search(docstring(place))]
    assert not silent, "no shape (like (o, i), or any shape) in: " + "; ".join(silent)


def test_what_counts_as_a_shape() -> None:
    for told in (
        "(o, i)",
        "rows (n,)",
        "o x r",
        "(n + 1, n + 1)",
        "(b, t, vocabulary)",
        "of any shape",
    ):
        assert SHAPE.search(told), told
    for told in (
        "the tensor",
        "rows [start, stop)",
        "(paper, section 3)",
        "a dtype (fp32)",
        "weights by name",
    ):
        assert not SHAPE.search(told), told
