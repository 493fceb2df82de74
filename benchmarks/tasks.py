"""Small synthetic tasks with exact answers, for benchmarks on a real model.

A row is ``{"prompt": str, "answer": str}``. The prompt is plain text (no chat template) that ends
in ``Answer:``; the answer follows directly after it and starts with a space. A model is right when
its greedy continuation, cut at the first line break and stripped, equals the stripped answer.

Rows come from SHA-256 of (task, split, seed, row, draw), not from a library's generator, so the
same call gives the same rows on every machine. Train and test cannot overlap: a hash of what makes
a row (its numbers, or its record) says which of the two splits it may be in, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

from deltafold.errors import DeltafoldError, nearest

Split = Literal["train", "test"]
T = TypeVar("T")

TEST_SHARE = 8  # one key in eight belongs to the test split
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "rocks", "shells", "stamps", "toys")
VERBS = {
    "more": ("buys {} more", "finds {} more", "gets {} more"),
    "fewer": ("loses {}", "sells {}", "gives away {}"),
}
STEPS = {
    "more": ("Then a friend adds {}.", "Then {} more arrive."),
    "fewer": ("Then a friend takes {}.", "Then {} are lost."),
    "double": ("Then the number doubles.",),
}
CITIES = ("Rome", "Paris", "Berlin", "Madrid", "London", "Tokyo", "Cairo", "Boston", "Lima", "Oslo")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "gray", "orange")


class Row(TypedDict):
    """One question and the exact text that answers it."""

    prompt: str
    answer: str


class UnknownTaskError(DeltafoldError):
    """The name is not that of a task."""


class Draws:
    """Numbers for one row, each the hash of a label and a counter."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._count = 0

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]; the bias of the modulo is below 2**-50 for these ranges."""
        self._count += 1
        return low + _hash(f"{self._label}/{self._count}") % (high - low + 1)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.between(0, len(options) - 1)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _arithmetic(draws: Draws) -> tuple[str, Row]:
    """A story of two steps; the answer gives the number after each step, as in `` 19, 38``.

    The first number is the short working that a small model needs, the last one is the result.
    Every number lies between 0 and 99.
    """
    name, item = draws.one_of(NAMES), draws.one_of(ITEMS)
    first = draws.one_of(("more", "fewer", "bags"))
    if first == "bags":
        a, b = draws.between(2, 9), draws.between(2, 5)
        middle, story = a * b, f"{name} has {b} bags with {a} {item} each."
    else:
        a = draws.between(4, 20)
        b = draws.between(2, min(9, a - 1))
        verb = draws.one_of(VERBS[first]).format(b)
        middle = a + b if first == "more" else a - b
        story = f"{name} has {a} {item} and {verb}."
    second = draws.one_of(("more", "fewer", "double"))
    c = draws.between(1, min(9, middle) if second == "fewer" else 9)
    last = {"more": middle + c, "fewer": middle - c, "double": middle * 2}[second]
    step = draws.one_of(STEPS[second]).format(c)
    prompt = f"{story} {step} How many {item} now?\nAnswer:"
    key = f"{first} {a} {b} {second} {'' if second == 'double' else c}"
    return key, {"prompt": prompt, "answer": f" {middle}, {last}"}


def _extraction(draws: Draws) -> tuple[str, Row]:
    """A record of four fields in any order; the answer is the value of one of them."""
    record = {
        "name": draws.one_of(NAMES),
        "city": draws.one_of(CITIES),
        "color": draws.one_of(COLORS),
        "order": str(draws.between(100, 999)),
    }
    key = " ".join(record.values())
    fields = sorted(record, key=lambda field: draws.between(0, 2**32))
    wanted = draws.one_of(fields)
    listed = ", ".join(f"{field} = {record[field]}" for field in fields)
    prompt = f"Record: {listed}.\nWhat is the {wanted}?\nAnswer:"
    return key, {"prompt": prompt, "answer": f" {record[wanted]}"}


def _sorting(draws: Draws) -> tuple[str, Row]:
    """Four numbers between 10 and 99, all different; the answer lists them from small to large."""
    numbers: list[int] = []
    while len(numbers) < 4:
        number = draws.between(10, 99)
        if number not in numbers:
            numbers.append(number)
    key = " ".join(map(str, sorted(numbers)))
    listed, ordered = (", ".join(map(str, each)) for each in (numbers, sorted(numbers)))
    prompt = f"Numbers: {listed}.\nFrom smallest to largest?\nAnswer:"
    return key, {"prompt": prompt, "answer": f" {ordered}"}


TASKS: dict[str, Callable[[Draws], tuple[str, Row]]] = {
    "arithmetic": _arithmetic,
    "extraction": _extraction,
    "sorting": _sorting,
}


def make_rows(task: str, split: Split, count: int, seed: int = 0) -> list[Row]:
    """The first `count` rows of a split, all prompts different.

    Raises UnknownTaskError when there is no such task.
    """
    if task not in TASKS:
        raise UnknownTaskError(f"There is no task {task!r}; {nearest(task, sorted(TASKS))}")
    rows: dict[str, Row] = {}
    candidate = 0
    while len(rows) < count:
        key, row = TASKS[task](Draws(f"{task}/{split}/{seed}/{candidate}"))
        candidate += 1
        if (_hash(f"{task} split of {key}") % TEST_SHARE == 0) == (split == "test"):
            rows.setdefault(row["prompt"], row)
    return list(rows.values())


def describe(task: str) -> str:
    """The docstring of a task in one line, for records."""
    return " ".join((TASKS[task].__doc__ or "").split())


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
