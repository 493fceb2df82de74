"""Task files (JSON lines) and texts, checked row by row before any model is loaded.

The kind of a task is told from its fields: a row with `choices` is multiple choice, any other is
exact match. All rows of a file are of one kind. Further fields of a row are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.archive import file_digest
from deltafold.errors import DeltafoldError, UsageError
from deltafold.foreign import unread


class TaskError(DeltafoldError):
    """A task file or a text that cannot be measured on."""


@dataclass(frozen=True)
class AnswerRow:
    """The prompt and the exact text that answers it; `where` names file and line."""

    where: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class ChoiceRow:
    """The prompt, the texts that may follow it, and the index of the right one."""

    where: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TaskFile:
    """One task: all rows of a file, of one kind."""

    name: str
    path: Path
    digest: str
    answer_rows: tuple[AnswerRow, ...] = ()
    choice_rows: tuple[ChoiceRow, ...] = ()

    @property
    def kind(self) -> str:
        return "choices" if self.choice_rows else "exact_match"

    @property
    def n_rows(self) -> int:
        return len(self.answer_rows) + len(self.choice_rows)


@dataclass(frozen=True)
class TextFile:
    """One text, whole."""

    path: Path
    digest: str
    text: str


def read_tasks(paths: Sequence[str | Path], limit: int | None = None) -> list[TaskFile]:
    """Read task files; each is named by its stem. `limit` keeps the first rows of each.

    Every row is checked, also those beyond the limit. Raises TaskError naming file and line, and
    UsageError when two files would have the same name.
    """
    tasks: dict[str, TaskFile] = {}
    for path in map(Path, paths):
        if path.stem in tasks:
            raise UsageError(
                f"{tasks[path.stem].path} and {path} would both be called {path.stem!r} in the "
                "table; rename one of them."
            )
        tasks[path.stem] = _read_task(path, limit)
    return list(tasks.values())


def read_texts(paths: Sequence[str | Path]) -> list[TextFile]:
    """Read UTF-8 texts. Raises TaskError when one is missing, empty or not UTF-8."""
    texts = []
    for path in map(Path, paths):
        raw = _read(path)
        text = _decode(path, raw)
        if not text.strip():
            raise TaskError(f"{path} is empty; give a text of at least a few hundred words.")
        texts.append(TextFile(path, file_digest(raw), text))
    return texts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unread(error, path, TaskError) from None


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path} is not UTF-8 (byte {error.start:,} cannot be read); save it as UTF-8."
        ) from None


def _read_task(path: Path, limit: int | None) -> TaskFile:
    raw = _read(path)
    rows: list[AnswerRow | ChoiceRow] = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(_decode(path, raw).split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, f"{path}, line {number}"))
            if type(rows[-1]) is not type(rows[0]):
                raise TaskError(
                    f"{rows[-1].where}: the rows above are of another kind (with and without "
                    '"choices"); give each kind a file of its own.'
                )
    if not rows:
        raise TaskError(f"{path} holds no rows; give one JSON object a line.")
    kept = rows[:limit]
    return TaskFile(
        path.stem,
        path,
        file_digest(raw),
        tuple(row for row in kept if isinstance(row, AnswerRow)),
        tuple(row for row in kept if isinstance(row, ChoiceRow)),
    )


def _parse_row(line: str, where: str) -> AnswerRow | ChoiceRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}); give one JSON object a line.") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where}: not a JSON object; give fields such as prompt and answer.")
    field = "prompt" if "prompt" in row or "question" not in row else "question"
    prompt = _text(row, field, where)
    if "choices" in row:
        choices = _choices(row["choices"], where)
        return ChoiceRow(where, prompt, choices, _right_choice(row, choices, where))
    return AnswerRow(where, prompt, _text(row, "answer", where))


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise TaskError(
            f'{where}: the row has no "{field}" (it has {", ".join(row) or "no fields"}); '
            'a row is {"prompt": ..., "answer": ...}, with "choices": [...] for multiple choice.'
        )
    if not isinstance(row[field], str) or not row[field].strip():
        raise TaskError(f'{where}: "{field}" is not a text, or empty; put a text in quotes there.')
    return str(row[field])


def _choices(value: object, where: str) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not all(isinstance(choice, str) and choice for choice in value)
        or len(set(value)) < len(value)
    ):
        raise TaskError(f'{where}: "choices" is not a list of two or more different texts; fix it.')
    return tuple(value)


def _right_choice(row: dict[str, Any], choices: tuple[str, ...], where: str) -> int:
    answer = row.get("answer")
    if isinstance(answer, str):
        matching = [i for i, choice in enumerate(choices) if choice.strip() == answer.strip()]
        if len(matching) == 1:
            return matching[0]
    # bool is an int in Python, yet `true` is no index.
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise TaskError(
        f'{where}: "answer" is neither an index from 0 to {len(choices) - 1} nor the text of one '
        "of the choices; fix it."
    )
