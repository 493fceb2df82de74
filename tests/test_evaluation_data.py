"""Task files and texts: what is read, and the one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_models import write_rows

from deltafold.errors import DeltafoldError, UsageError
from deltafold.evaluation.data import AnswerRow, ChoiceRow, TaskError, read_tasks, read_texts

GOOD = {"prompt": "1+1=", "answer": "2"}
CHOICE = {"question": "1+1=", "choices": ["2", "3"], "answer": 0}


def test_kind_is_told_from_the_fields(tmp_path: Path) -> None:
    sums = write_rows(
        tmp_path / "sums.jsonl", [GOOD | {"note": 7}, {"question": "q", "answer": "a"}]
    )
    quiz = write_rows(tmp_path / "quiz.jsonl", [CHOICE, CHOICE | {"answer": " 3 "}])
    first, second = read_tasks([sums, quiz])
    assert (first.name, first.kind, first.n_rows) == ("sums", "exact_match", 2)
    assert first.answer_rows[1] == AnswerRow(f"{sums}, line 2", "q", "a")
    assert (second.kind, second.n_rows) == ("choices", 2)
    assert second.choice_rows[1] == ChoiceRow(f"{quiz}, line 2", "1+1=", ("2", "3"), 1)


def test_blank_lines_do_not_count_but_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    # U+2028 ends a line for str.splitlines(), yet may stand in a JSON string as it is.
    row = json.dumps({"prompt": "a\u2028b", "answer": "c"}, ensure_ascii=False)
    path.write_text(f"\n{row}\n\n", encoding="utf-8")
    (task,) = read_tasks([path])
    assert task.answer_rows == (AnswerRow(f"{path}, line 2", "a\u2028b", "c"),)


def test_limit_keeps_the_first_rows_and_still_checks_the_rest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [GOOD, GOOD, GOOD])
    assert read_tasks([path], limit=2)[0].n_rows == 2
    write_rows(path, [GOOD, {"prompt": "x"}])
    with pytest.raises(TaskError, match="line 2"):
        read_tasks([path], limit=1)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x"}, 'no "answer"'),
        ({"answer": "x"}, 'no "prompt"'),
        ({"prompt": "", "answer": "x"}, '"prompt" is not a text'),
        ({"prompt": "x", "answer": 3}, '"answer" is not a text'),
        ({"prompt": "x", "answer": "  "}, '"answer" is not a text'),
        ([1, 2], "not a JSON object"),
        (CHOICE | {"choices": ["2"]}, "two or more"),
        (CHOICE | {"choices": "23"}, "two or more"),
        (CHOICE | {"choices": ["2", "2"]}, "two or more"),
        (CHOICE | {"answer": 2}, "0 to 1"),
        (CHOICE | {"answer": True}, "0 to 1"),
        (CHOICE | {"answer": "4"}, "0 to 1"),
        (CHOICE, "another kind"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, says: str) -> None:
    path = write_rows(tmp_path / "t.jsonl", [GOOD, row])
    with pytest.raises(TaskError) as caught:
        read_tasks([path])
    assert f"{path}, line 2: " in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_get_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for content, says in (
        (b"{prompt\n", "line 1: not JSON"),
        (b"\xff", "not UTF-8"),
        (b"", "no rows"),
    ):
        path.write_bytes(content)
        with pytest.raises(TaskError, match=says):
            read_tasks([path])
    with pytest.raises(TaskError, match="cannot be read"):
        read_tasks([tmp_path / "nowhere.jsonl"])
    path.write_bytes(b" \n")
    with pytest.raises(TaskError, match="is empty"):
        read_texts([path])
    assert issubclass(TaskError, DeltafoldError)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [write_rows(tmp_path / part / "t.jsonl", [GOOD]) for part in (".", "b")]
    with pytest.raises(UsageError, match="both be called 't'"):
        read_tasks(paths)
