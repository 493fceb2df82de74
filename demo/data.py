"""Seeded data of the demo: the base's text, two tasks with exact answers, multiple-choice rows.

Run `python demo/data.py --out DIR` to write only the test files (no training). Rows join with
nothing between: the model sees `prompt + answer` or `prompt + choice`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from world import ANIMALS, LETTERS, THINGS, Dice, documents, story

Row = dict[str, Any]

TRAIN_DOCUMENTS = 60_000
HELD_OUT_BYTES = 30_000
TEST_ROWS = 200
DRAWS = 60_000
DOCUMENTS_A_PAGE = 6


def world_text(seed: int) -> tuple[list[str], str]:
    """The base's text: (training pages, held-out text of about 30 kB).

    A page is six documents, one a line. No held-out document is in the training pages, though
    the facts that it tells are.
    """
    train = documents(seed, "train", TRAIN_DOCUMENTS, frozenset())
    unseen = documents(seed, "test", HELD_OUT_BYTES // 50, frozenset(train))
    pages = [
        "\n".join(train[k : k + DOCUMENTS_A_PAGE]) for k in range(0, len(train), DOCUMENTS_A_PAGE)
    ]
    held_out, size_bytes = [], 0
    for line in unseen:
        if size_bytes >= HELD_OUT_BYTES:
            break
        held_out.append(line)
        size_bytes += len(line) + 1
    return pages, "\n".join(held_out) + "\n"


def sort_row(dice: Dice) -> Row:
    """Six different letters, to be put in the order of the alphabet."""
    letters = dice.sample(LETTERS, 6)
    return {"prompt": f"sort {' '.join(letters)} =", "answer": " ".join(sorted(letters))}


def add_row(dice: Dice) -> Row:
    """Two numbers of two digits, to be added."""
    a, b = 10 + dice.below(90), 10 + dice.below(90)
    return {"prompt": f"add {a}+{b}=", "answer": str(a + b)}


TASKS: dict[str, Callable[[Dice], Row]] = {"sort": sort_row, "add": add_row}


def task_rows(name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """The (training rows, 200 test rows) of a task: all prompts differ, so the two are disjoint.

    A prompt that is drawn twice counts once, so a small task has fewer rows than were drawn.
    """
    dice = Dice(f"task/{name}/{seed}")
    rows: dict[str, Row] = {}
    for _ in range(DRAWS):
        row = TASKS[name](dice)
        rows.setdefault(row["prompt"], row)
    ordered = list(rows.values())
    return ordered[TEST_ROWS:], ordered[:TEST_ROWS]


def fact_choice(dice: Dice) -> tuple[str, str, list[str]]:
    """A fact of the world: (prompt, answer, every value that the fact could have)."""
    column = dice.below(5)
    if column == 4:
        name = dice.pick(list(THINGS))
        return f"The {name} is good for", THINGS[name][1], [use for _, use in THINGS.values()]
    name = dice.pick(list(ANIMALS))
    prompts = (
        f"The {name} is",
        f"The {name} lives in the",
        f"The {name} eats",
        f"When it wakes up, the {name}",
    )
    return prompts[column], ANIMALS[name][column], [facts[column] for facts in ANIMALS.values()]


def choice_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Multiple-choice rows, four choices each: (100 on facts of the world, 100 on stories).

    The facts stand in the training text. A story is new, and its wrong choices are the other
    places of its cast, so it has to be read to be answered.
    """
    dice = Dice(f"choices/{seed}")
    rows: dict[str, Row] = {}
    while len(rows) < TEST_ROWS:
        make = fact_choice if len(rows) % 2 == 0 else story
        prompt, answer, values = make(dice)
        others = [value for value in dict.fromkeys(values) if value != answer]
        choices = dice.sample([answer, *dice.sample(others, 3)], 4)
        row = {
            "prompt": prompt,
            "choices": [f" {choice}" for choice in choices],
            "answer": choices.index(answer),
        }
        rows.setdefault(f"{prompt} {sorted(choices)}", row)
    made = list(rows.values())
    return made[::2], made[1::2]


def write_tests(out: Path, seed: int) -> None:
    """Write the tasks' rows, `choices.jsonl`, `stories.jsonl` and `text.txt` into `out/tasks`."""
    folder = out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    facts, stories = choice_rows(seed)
    files = {name: task_rows(name, seed)[1] for name in TASKS}
    files |= {"choices": facts, "stories": stories}
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "text.txt").write_text(world_text(seed)[1], encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo's test files.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    given = parser.parse_args()
    write_tests(given.out, given.seed)
