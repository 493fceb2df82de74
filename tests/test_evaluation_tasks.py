"""Exact match against generation one row at a time, multiple choice on a case worked by hand."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import (
    END,
    VOCABULARY,
    make_gpt2,
    make_llama,
    make_tokenizer,
    nudged,
    write_rows,
)

from deltafold.errors import UsageError
from deltafold.evaluation.choices import Choices
from deltafold.evaluation.data import AnswerRow, ChoiceRow, TaskError, TaskFile
from deltafold.evaluation.divergence import score
from deltafold.evaluation.exact_match import SPARE_TOKENS, ExactMatch, first_lines
from deltafold.evaluation.lm_eval import Harness
from deltafold.evaluation.segments import Encoder, Subject

PROMPTS = ["1+1=", "the quick brown fox", "a?", "say: what is the sum of 10 and 7?", "x y z", "0"]


def exact(answers: list[str], batch_size: int = 4, tokens: int | None = None) -> ExactMatch:
    rows = tuple(
        AnswerRow(f"row {i}", prompt, answer)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    )
    task = TaskFile("task", Path("task.jsonl"), "", answer_rows=rows)
    return ExactMatch.prepare(task, Encoder(make_tokenizer()), [END], batch_size, tokens)


def greedy(model: Any, prompt: str, tokens: int) -> str:
    """Plain greedy decoding without cache, batch or padding, up to the end token."""
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    made: list[int] = []
    while len(made) < tokens:
        with torch.no_grad():
            following = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if following == END:
            break
        made.append(following)
    return str(tokenizer.decode(made, skip_special_tokens=True))


@pytest.mark.parametrize(("make", "seed"), [(make_llama, 3), (make_gpt2, 4)])
def test_answers_are_those_of_generating_one_by_one(make: Any, seed: int) -> None:
    model = make(seed)
    expected = [first_lines(greedy(model, prompt, 12), 1) for prompt in PROMPTS]
    assert len(set(expected)) > 3 and all(expected)  # a case that tells
    wrong = [*expected[:2], *(answer + "x" for answer in expected[2:])]
    for batch_size in (1, 4, 6):
        right = exact(expected, batch_size, 12)
        made = [first_lines(text, 1) for text in right.generate(Subject("m", model))]
        assert made == expected
        assert right.measure(Subject("m", model), None)["exact_match"]["value"] == 1
        partly = exact(wrong, batch_size, 12).measure(Subject("m", model), None)["exact_match"]
        assert partly["value"] == pytest.approx(2 / 6)
        assert partly["stderr"] == pytest.approx((2 / 6 * 4 / 6 / 6) ** 0.5)


class Script:
    """Stands in for a model: whatever comes in, the logits spell out one text, token by token."""

    def __init__(self, ids: list[int]):
        self.model = make_gpt2(0)
        forward = self.model.forward
        self.steps = 0

        def spelled(*args: Any, **inputs: Any) -> Any:
            output = forward(*args, **inputs)
            output.logits[:] = 0
            output.logits[:, -1, ids[min(self.steps, len(ids) - 1)]] = 1
            self.steps += 1
            return output

        self.model.forward = spelled


@pytest.mark.parametrize(
    ("spelled", "answer", "right", "steps"),
    [
        (" 42\nmore", "42", True, 4),  # stops at the line break
        ("\n 42\nmore", "42", True, 5),  # white space before the answer does not stop it
        ("4 2\n", "42", False, 4),
        ("4\n2\nx", "4\n2", True, 4),  # an answer of two lines
        ("42<end>7", "42", True, 3),  # the end token
        ("42777777777777777", "42", False, 2 + SPARE_TOKENS),  # the cap
    ],
)
def test_where_generation_stops(spelled: str, answer: str, right: bool, steps: int) -> None:
    tokenizer = make_tokenizer()
    script = Script(tokenizer(spelled)["input_ids"])
    rows = (AnswerRow("row", "a?", answer), AnswerRow("row", "10+10=", answer))
    task = TaskFile("task", Path("task.jsonl"), "", answer_rows=rows)
    measured = ExactMatch.prepare(task, Encoder(tokenizer), [END], 2).measure(
        Subject("script", script.model), None
    )
    assert measured["exact_match"]["value"] == right
    assert script.steps == steps


def test_divergence_is_taken_on_the_answers_tokens_alone() -> None:
    teacher, student = make_llama(0), nudged(make_llama(0), 1, 0.1)
    answers = ["2", "jumps", "b", "17", "w", "12"]
    task = exact(answers)
    measured = task.measure(Subject("s", student), Subject("t", teacher))
    total, agreed = 0.0, 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([make_tokenizer()(prompt + answer)["input_ids"]])
        with torch.no_grad():
            p = teacher(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            q = student(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
    n = sum(map(len, answers))
    assert measured["kl"]["value"] == pytest.approx(total / n, rel=1e-4)
    assert measured["agreement"]["value"] == pytest.approx(agreed / n)
    assert measured["kl"]["n"] == n
    own = task.measure(Subject("t", teacher), Subject("t", teacher))
    assert (own["kl"]["value"], own["agreement"]["value"]) == (0, 1)


def test_choices_by_sum_and_by_mean_on_a_case_worked_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first choice has the best sum, the second the best mean per token."""
    rows = (ChoiceRow("row 1", "q:", ("a", "bbb"), 0), ChoiceRow("row 2", "q:", ("a", "bbb"), 1))
    task = TaskFile("quiz", Path("quiz.jsonl"), "", choice_rows=rows)
    choices = Choices.prepare(task, Encoder(make_tokenizer()), batch_size=3)
    model = make_gpt2(0)
    forward = model.forward
    a, b = make_tokenizer()("ab")["input_ids"]

    def fixed(**inputs: Any) -> Any:
        """Whatever came before: a has probability e^-2, b e^-1, the rest what is left, evenly."""
        output = forward(**inputs)
        rest = (1 - torch.tensor(-2.0).exp() - torch.tensor(-1.0).exp()) / (VOCABULARY - 2)
        output.logits[:] = rest.log()
        output.logits[..., a], output.logits[..., b] = -2.0, -1.0
        return output

    monkeypatch.setattr(model, "forward", fixed)
    losses = score(Subject("m", model), choices.segments, 3).loss
    torch.testing.assert_close(losses, torch.tensor([2.0, 3.0, 2.0, 3.0], dtype=torch.float64))
    assert choices._hits(losses) == [True, False]
    measured = choices.measure(Subject("m", model), None)
    assert measured["accuracy"] == {"value": 0.5, "stderr": pytest.approx(0.125**0.5), "n": 2}
    per_token = choices._hits(losses / torch.tensor([1, 3, 1, 3]))
    assert per_token == [False, True]
    assert measured["accuracy_normalised"]["value"] == 0.5


def test_the_prompt_begins_with_the_beginning_token_once() -> None:
    plain, begun = Encoder(make_tokenizer()), Encoder(make_tokenizer(begins=True))
    assert plain.beginning("ab") == begun.ids("ab") == begun.beginning("ab")[1:]
    assert begun.beginning("<begin>ab") == begun.beginning("ab")
    segment = begun.segment("ab", "cd", "row")
    assert segment.start == 3 and begun.decode(segment.targets) == "cd"


class Merging:
    """A tokenizer that drops tildes and reads `ab` as one token, also across a seam."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text.replace("ab", "1").replace("~", "")]}


def test_the_seam_of_prompt_and_answer() -> None:
    encoder = Encoder(Merging())
    assert encoder.segment("xa", "bc", "row").ids == tuple(map(ord, "xabc"))  # not x1c
    assert encoder.segment("x", "abc", "row").ids == tuple(map(ord, "x1c"))
    for prompt, answer, says in (("~", "b", "the prompt becomes"), ("b", "~", "'~' becomes")):
        with pytest.raises(TaskError, match=f"line 3: {says}"):
            encoder.segment(prompt, answer, "f, line 3")


def test_a_missing_harness_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'deltafold\[lm-eval\]'"):
        Harness.prepare(["a"], None, None, 1)


@pytest.mark.integration
def test_lm_eval_runs_local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"{i}+1=", "options": [str(i + 1), str(i)], "gold": i % 2} for i in range(6)]
    data = write_rows(tmp_path / "quiz.jsonl", rows)
    (tmp_path / "tiny_quiz.yaml").write_text(
        textwrap.dedent(f"""
        task: tiny_quiz
        dataset_path: json
        dataset_kwargs:
          data_files:
            test: {json.dumps(str(data))}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{{{q}}}}"
        doc_to_choice: "{{{{options}}}}"
        doc_to_target: gold
        metric_list:
          - metric: acc
        """)
    )
    tokenizer, model = make_tokenizer(), make_llama(0)
    harness = Harness.prepare(["tiny_quiz"], tmp_path, tokenizer, 2, None)
    figure = harness.measure(Subject("m", model))["tiny_quiz"]["acc"]

    task = TaskFile(
        "quiz", data, "",
        choice_rows=tuple(
            # The harness puts a space between prompt and choice.
            ChoiceRow("", row["q"], tuple(f" {o}" for o in row["options"]), row["gold"])
            for row in rows
        ),
    )  # fmt: skip
    own = Choices.prepare(task, Encoder(tokenizer), 2).measure(Subject("m", model), None)
    assert figure["value"] == pytest.approx(own["accuracy"]["value"])
    assert figure["n"] == 6 and figure["stderr"] > 0
    with pytest.raises(UsageError, match="no task 'tiny_quizz'"):
        Harness.prepare(["tiny_quizz"], tmp_path, tokenizer, 2, None)
