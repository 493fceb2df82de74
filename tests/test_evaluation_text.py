"""Perplexity, KL and agreement against a computation by hand, one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import (
    BEGIN,
    TEXT,
    VOCABULARY,
    make_gpt2,
    make_llama,
    make_tokenizer,
    nudged,
)

from deltafold.errors import NonFiniteError
from deltafold.evaluation import segments as segments_module
from deltafold.evaluation.data import TextFile
from deltafold.evaluation.divergence import score
from deltafold.evaluation.estimate import exponential, proportion, ratio_of_sums
from deltafold.evaluation.perplexity import Texts, windows
from deltafold.evaluation.segments import Encoder, Segment, Subject


def texts(batch_size: int = 4, begins: bool = False, max_length: int = 20) -> Texts:
    file = TextFile(Path("text.txt"), "", TEXT)
    return Texts.prepare([file], Encoder(make_tokenizer(begins)), max_length, batch_size)


def by_hand(student: Any, teacher: Any, segments: tuple[Segment, ...]) -> dict[str, float]:
    """One window at a time, one token at a time, without padding."""
    losses, kls, agreed = [], [], []
    for segment in segments:
        for at in range(segment.start, len(segment.ids)):
            context = torch.tensor([segment.ids[:at]])
            with torch.no_grad():
                q = student(context).logits[0, -1].double().softmax(-1)
                p = teacher(context).logits[0, -1].double().softmax(-1)
            losses.append(-math.log(q[segment.ids[at]]))
            kls.append(float((p * (p / q).log()).sum()))
            agreed.append(float(p.argmax() == q.argmax()))
    n = len(losses)
    return {
        "n": n,
        "perplexity": math.exp(sum(losses) / n),
        "kl_text": sum(kls) / n,
        "agreement_text": sum(agreed) / n,
    }


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("begins", [False, True])
def test_figures_equal_those_worked_out_token_by_token(make: Any, begins: bool) -> None:
    teacher, student = make(0), nudged(make(0), 1, 0.1)
    text = texts(begins=begins)
    measured = text.measure(Subject("student", student), Subject("teacher", teacher))
    expected = by_hand(student, teacher, text.segments)
    assert expected["kl_text"] > 0.02 and 0.1 < expected["agreement_text"] < 1  # a case that tells
    for name in ("perplexity", "kl_text", "agreement_text"):
        assert measured[name]["value"] == pytest.approx(expected[name], rel=1e-4)
        assert measured[name]["n"] == expected["n"]
        assert measured[name]["stderr"] > 0


def test_a_model_agrees_with_itself_exactly() -> None:
    model = make_llama(0)
    measured = texts().measure(Subject("twin", model), Subject("teacher", model))
    assert measured["kl_text"]["value"] == 0
    assert measured["agreement_text"]["value"] == 1


def test_windows_score_every_token_once() -> None:
    ids = list(range(10, 47))
    for max_length in (2, 3, 7, 36, 37, 100):
        plain = windows(ids, [], max_length)
        assert [token for each in plain for token in each.targets] == ids[1:]
        begun = windows(ids, [BEGIN], max_length)
        assert [token for each in begun for token in each.targets] == ids
        assert all(len(each.ids) <= max_length for each in plain + begun)
        assert all(each.ids[0] == BEGIN for each in begun)
    assert windows([5], [], 4) == []
    assert windows([BEGIN, 5], [BEGIN], 4) == [Segment((BEGIN, 5), 1)]


def test_batch_size_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = Subject("s", nudged(make_llama(0), 1, 0.1)), Subject("t", make_llama(0))
    parts = [
        Segment(tuple(range(3, 3 + length)), start)
        for length, start in ((9, 1), (3, 2), (30, 25), (12, 4), (30, 1))
    ]
    alone = [score(student, [part], 1, teacher) for part in parts]
    batched = score(student, parts, 5, teacher)
    for name in ("tokens", "loss", "kl", "agreed"):
        one_by_one = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(getattr(batched, name), one_by_one, rtol=1e-4, atol=1e-6)
    assert batched.tokens.tolist() == [8, 1, 5, 8, 29]

    seen: list[int] = []
    forward = student.model.forward
    monkeypatch.setattr(segments_module, "LOGITS_BYTES", 60 * VOCABULARY * 4)

    def watched(**inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(student.model, "forward", watched)
    small = score(student, parts, 5, teacher)
    assert seen == [2, 3]  # two of 30 tokens fill the allowance
    torch.testing.assert_close(small.kl, batched.kl, rtol=1e-4, atol=1e-6)


def test_vocabularies_are_compared_where_they_overlap() -> None:
    teacher, student = make_llama(0), make_llama(0, VOCABULARY + 5)
    shared = nudged(make_llama(0), 1, 0.1)
    with torch.no_grad():
        student.load_state_dict(
            {
                name: torch.cat([value, torch.randn(5, 32)])
                if "embed" in name or "head" in name
                else value
                for name, value in shared.state_dict().items()
            }
        )
    segments = [Segment(tuple(range(3, 30)), 1)]
    larger = score(Subject("s", student), segments, 1, Subject("t", teacher))
    equal = score(Subject("s", shared), segments, 1, Subject("t", teacher))
    torch.testing.assert_close(larger.kl, equal.kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(larger.agreed, equal.agreed)
    assert larger.loss > equal.loss  # the loss is over the model's own vocabulary


def test_a_broken_model_is_named() -> None:
    model = make_llama(0)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(NonFiniteError, match="broken gives NaN"):
        texts().measure(Subject("broken", model), None)
    with torch.no_grad():
        model.lm_head.weight.copy_(1e5 * torch.randn(model.lm_head.weight.shape))
    with pytest.raises(NonFiniteError, match="perplexity of broken"):
        texts().measure(Subject("broken", model), None)


def test_standard_errors_on_cases_worked_by_hand() -> None:
    # Groups of equal size: the plain standard error of the mean of 1, 2, 3, 6 (std 2.1602) / 2.
    figure = ratio_of_sums(torch.tensor([2.0, 4.0, 6.0, 12.0]), torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert figure == {"value": 3.0, "stderr": pytest.approx(2.160247 / 2), "n": 8}
    # Unequal: mean 6/4; residuals 1 - 1.5, 5 - 4.5; sqrt(2 (0.25 + 0.25)) / 4.
    figure = ratio_of_sums(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    assert figure == {"value": 1.5, "stderr": pytest.approx(0.25), "n": 4}
    assert exponential(figure)["stderr"] == pytest.approx(math.exp(1.5) * 0.25)
    assert ratio_of_sums(torch.tensor([3.0]), torch.tensor([2.0]))["stderr"] is None
    assert proportion([True, False, False, False]) == {
        "value": 0.25,
        "stderr": pytest.approx(math.sqrt(0.25 * 0.75 / 4)),
        "n": 4,
    }
