"""Sample answers and the command line, kept in the records of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_models import make_llama, make_tokenizer, nudged, save, write_rows

from deltafold.errors import DeltafoldError, UsageError
from deltafold.evaluation.evaluate import evaluate

SUMS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    save(make_llama(0), folder / "base", make_tokenizer())
    save(nudged(make_llama(0), 1, 0.1), folder / "tuned", make_tokenizer())
    write_rows(folder / "sums.jsonl", SUMS)
    quiz = [{"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}]
    write_rows(folder / "quiz.jsonl", quiz)
    return folder


def answers_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    return model["metrics"].get("answers", [])


def test_first_rows_are_kept_in_their_order(home: Path) -> None:
    tasks = [home / "sums.jsonl", home / "quiz.jsonl"]
    record = evaluate(home / "tuned", base=home / "base", tasks=tasks, answers=3, batch_size=2)
    for model in record["models"]:
        kept = answers_of(model)
        assert [each["prompt"] for each in kept] == ["0+1=", "1+1=", "2+1="]
        assert [each["wanted"] for each in kept] == ["1", "2", "3"]
        assert all(each["right"] == (each["text"] == each["wanted"]) for each in kept)
        assert set(model["metrics"]["tasks"]) == {"sums", "quiz"}
        assert "answers" not in model["metrics"]["tasks"]["sums"]


def test_none_are_kept_where_none_are_asked_for(home: Path) -> None:
    record = evaluate(home / "tuned", tasks=[home / "sums.jsonl"], answers=0)
    assert answers_of(record["models"][0]) == []
    with pytest.raises(UsageError, match="--answers -1"):
        evaluate(home / "tuned", tasks=[home / "sums.jsonl"], answers=-1)


@pytest.mark.integration
def test_compress_asks_all_three(home: Path, tmp_path: Path) -> None:
    import deltafold

    archive = tmp_path / "tuned.delta"
    record = deltafold.compress(
        home / "base", home / "tuned", archive, "lossless", tasks=[home / "sums.jsonl"], answers=2
    )
    assert record == json.loads((tmp_path / "tuned.delta.record.json").read_text())
    base, tuned, restored = record["scores"]
    assert [row["role"] for row in record["scores"]] == ["base", "fine-tune", "candidate"]
    assert answers_of(tuned) == answers_of(restored) and len(answers_of(base)) == 2
    assert restored["metrics"]["tasks"]["sums"]["kl"]["value"] < 1e-9


def test_a_broken_task_is_told_of_before_any_work(home: Path, tmp_path: Path) -> None:
    import deltafold

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    with pytest.raises(DeltafoldError, match="line 1"):
        deltafold.compress(home / "base", home / "tuned", tmp_path / "x.delta", tasks=[broken])
    assert not (tmp_path / "x.delta").exists() and not list(tmp_path.glob("x.delta*"))


@pytest.mark.integration
def test_the_command_line_is_kept(deltafold: Any, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "my archive.delta"
    done = deltafold("compress", home / "base", home / "tuned", "-o", out, "-m", "lossless")
    assert done.returncode == 0, done.stderr
    record = json.loads(out.with_name(out.name + ".record.json").read_text())
    assert record["command"].startswith("deltafold compress ") and f"'{out}'" in record["command"]
