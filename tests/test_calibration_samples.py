"""Calibration text: files of every kind, what is counted, and text that a model writes itself."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import (
    BEGIN,
    END,
    TEXT,
    make_gpt2,
    make_llama,
    make_tokenizer,
    save,
    write_rows,
)

from deltafold.calibration import selftext
from deltafold.calibration.batches import Sample
from deltafold.calibration.samples import (
    SampleError,
    check_limits,
    cut_windows,
    page_samples,
    read_samples,
)
from deltafold.calibration.selftext import Text, pick, write_texts
from deltafold.calibration.stream import StreamedModel
from deltafold.calibration.tokens import Encoder, end_ids, load_tokenizer
from deltafold.errors import CheckpointError, UsageError

TEMPLATE = (
    "{% for m in messages %}{{ 'u: ' if m.role == 'user' else 'a: ' }}{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer(begins=True)


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, 24)


def spoken(encoder: Encoder, sample: Sample) -> tuple[str, str]:
    """(context, counted text) of a sample."""
    decode = encoder.tokenizer.decode
    return decode(list(sample.ids[: sample.start])), decode(list(sample.ids[sample.start :]))


def one(path: Path, row: Any, encoder: Encoder) -> tuple[str, str]:
    (sample,) = read_samples(write_rows(path, [row]), encoder, 5, 0)
    return spoken(encoder, sample)


@pytest.mark.parametrize(
    ("row", "context", "counted"),
    [
        ({"prompt": "2+3=", "answer": " 5", "more": 1}, "<begin>2+3=", " 5"),
        ({"question": "is it?", "answer": "no"}, "<begin>is it?", "no"),
        ({"question": "is it?", "choices": ["no", "yes"], "answer": 1}, "<begin>is it?", "yes"),
        ({"prompt": "a cat"}, "<begin>", "a cat"),
        ({"text": "a cat", "answer": "x"}, "<begin>", "a cat"),
        ({"prompt": "a cat", "answer": None}, "<begin>", "a cat"),
        ({"prompt": "abc" * 10, "answer": "xyz"}, "abc" * 7, "xyz"),
        ({"prompt": "abc", "answer": "x" * 40}, "c", "x" * 23),
        ({"text": "abc" * 20}, "<begin>", ("abc" * 20)[:23]),
    ],
)
def test_rows(
    tmp_path: Path, encoder: Encoder, row: dict[str, Any], context: str, counted: str
) -> None:
    assert one(tmp_path / "rows.jsonl", row, encoder) == (context, counted)


def test_chats(tmp_path: Path, encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = TEMPLATE
    ask, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    found = one(tmp_path / "rows.jsonl", {"messages": [ask, reply]}, encoder)
    assert found == ("<begin>u: 2+2?<end>a: ", "4<end>")
    found = one(tmp_path / "rows.jsonl", {"messages": [ask]}, encoder)
    assert found == ("<begin>", "u: 2+2?<end>")


def test_an_answer_that_merges_with_its_prompt() -> None:
    """The tokens of prompt + answer do not begin with those of the prompt: tokenised apart."""

    class Merging:
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split(" ")]}

    assert Encoder(Merging(), 9).answer("ab cd", "efg h") == Sample((2, 2, 3, 1), 2)


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"the first.\n\nthe second.\n\n{TEXT}")
    samples = read_samples(path, encoder, 10, 0)
    texts = [spoken(encoder, each) for each in samples]
    assert all(context == "<begin>" for context, _ in texts)
    assert texts[0][1] == "the first.\n\nthe second."[:23]
    assert len(texts) == 1 + -(-len(TEXT) // (6 * 24)) and texts[1][1] == TEXT[:23]


def test_windows_lose_nothing() -> None:
    text = "one two three\n\nfour\n\n" + "five " * 30 + "\n\n\n\nsix" + "x" * 50
    pieces = list(cut_windows(text, 20))
    assert max(map(len, pieces)) <= 20
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert pieces[0] == "one two three\n\nfour"


def test_pages_of_the_package_are_cut_into_samples(encoder: Encoder) -> None:
    """Long pages give several samples, whole without a gap; few are drawn by the seed."""
    short, long = Encoder(encoder.tokenizer, 20), Encoder(encoder.tokenizer, 4096)
    every, pages = page_samples(short, 10**6, 0), page_samples(long, 10**6, 0)
    assert len(pages) > 150 and max(len(each.ids) for each in every) == 20
    first = pages[0].ids
    pieces = [every[n].ids for n in range(len(first) // 20)]
    assert [token for piece in pieces for token in piece] == list(first[: 20 * len(pieces)])
    few = page_samples(short, 7, 1)
    assert len(few) == 7 and few == page_samples(short, 7, 1) != page_samples(short, 7, 2)


def test_what_is_too_much_is_thinned_out_by_the_seed(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(50)])
    first = [spoken(encoder, each)[1] for each in read_samples(path, encoder, 8, 0)]
    assert len(first) == len(set(first)) == 8
    assert first == sorted(first, key=lambda text: int(text[4:]))
    assert first == [spoken(encoder, each)[1] for each in read_samples(path, encoder, 8, 0)]
    assert first != [spoken(encoder, each)[1] for each in read_samples(path, encoder, 8, 1)]
    assert len(read_samples(path, encoder, 80, 0)) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\nnope', r"rows.jsonl, line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]', r"line 3: not a JSON object"),
        ('{"words": "a"}', r'line 1: the row has no "prompt".*it has words'),
        ('{"prompt": 3}', r'line 1: "prompt" is not a text'),
        ('{"prompt": "a", "answer": 3}', r'line 1: "answer" is not a text'),
        ('{"messages": "hi"}', r'line 1: "messages" is not a list'),
        ('{"messages": [{"role": "user"}]}', r'line 1: "messages" is not a list'),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"chat template does not take"),
        ('{"text": ""}', r"holds no text to calibrate on"),
        ("", r"holds no text to calibrate on"),
    ],
)
def test_bad_rows(tmp_path: Path, encoder: Encoder, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(SampleError, match=message):
        read_samples(path, encoder, 5, 0)


def test_bad_files(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(SampleError, match=r"none.txt cannot be read .*; check it"):
        read_samples(tmp_path / "none.txt", encoder, 5, 0)
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    with pytest.raises(SampleError, match=r"latin.txt is not UTF-8 \(byte 3"):
        read_samples(tmp_path / "latin.txt", encoder, 5, 0)
    for limits in ((0, 10), (3, 1)):
        with pytest.raises(UsageError, match="too few"):
            check_limits(*limits)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_data_sets(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "how?", "answer": "so", "note": f"note {n}"} for n in range(3)]
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        if split == "none":
            raise ValueError("Unknown split")
        return rows

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    found = read_samples("datasets:org/name", encoder, 2, 0)
    assert [spoken(encoder, each) for each in found] == [("<begin>how?", "so")] * 2
    found = read_samples("datasets:org/name:test:note", encoder, 9, 0)
    assert [spoken(encoder, each)[1] for each in found] == ["note 0", "note 1", "note 2"]
    assert asked == [("org/name", "train"), ("org/name", "test")]
    with pytest.raises(SampleError, match="no field 'words', only question, answer, note"):
        read_samples("datasets:org/name:test:words", encoder, 9, 0)
    with pytest.raises(SampleError, match=r"cannot be loaded \(ValueError: Unknown split\)"):
        read_samples("datasets:org/name:none", encoder, 9, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(SampleError, match="needs the package datasets"):
        read_samples("datasets:org/name", encoder, 2, 0)


# Text that the model writes itself


def test_pick_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    draws = (torch.arange(1000) + 0.5) / 1000
    tokens = torch.tensor(pick(probabilities.log().expand(1000, 4), draws))
    assert torch.bincount(tokens, minlength=4).tolist() == [200, 0, 500, 300]
    assert pick(torch.tensor([[0.0, 5.0, -30.0]]), torch.tensor([1 - 2**-53])) == [2]


def test_turns_of_a_chat() -> None:
    """After the question's end the template speaks, then the model until it ends again."""
    text = Text([7], 1, None, after_turn=[END, 8, 9])  # type: ignore[arg-type]
    for drawn in (5, END, 6, 6, 4, END):
        assert not text.ended
        text.add(drawn, [END])
    assert text.ids == [7, 5, END, 8, 9, 4, END] and text.ended


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_written_text_is_the_same_with_and_without_a_cache(
    tmp_path: Path, tokenizer: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = TEMPLATE
    model = StreamedModel(save(make(3), tmp_path / "model", tokenizer))
    encoder = Encoder(load_tokenizer(tmp_path / "model"), 24)
    monkeypatch.setattr(selftext, "WRITERS", 5)
    whole = write_texts(model, encoder, 12, 0, 1 << 30)
    assert write_texts(model, encoder, 12, 0, 1000) == whole
    assert len(whole) == 12 and len({each.ids for each in whole}) == 12
    assert write_texts(model, encoder, 4, 1, 1 << 30) != whole[:4]
    for number, sample in enumerate(whole):
        start = encoder.beginning("u: ") if number % 2 else [BEGIN]
        assert list(sample.ids[: sample.start]) == start
        assert len(sample.ids) == 24 or sample.ids[-1] == END


def test_written_text_has_the_models_frequencies(tmp_path: Path, tokenizer: Any) -> None:
    """Samples of two tokens: the second is drawn from the model's prediction after the start."""
    built = make_llama(3)
    model = StreamedModel(save(built, tmp_path / "model", tokenizer))
    encoder = Encoder(load_tokenizer(tmp_path / "model"), 2)
    found = write_texts(model, encoder, 2000, 0, 1 << 30)
    drawn = torch.bincount(torch.tensor([each.ids[1] for each in found]), minlength=46) / 2000
    with torch.no_grad():
        wanted = built(torch.tensor([[BEGIN]])).logits[0, 0].softmax(-1)
    error = (drawn - wanted).abs()
    assert bool((error < 5 * (wanted * (1 - wanted) / 2000).sqrt() + 1e-9).all())


def test_ends_of_tokenizer_and_generation_config(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert end_ids(tmp_path, tokenizer) == [END]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, END]}))
    assert end_ids(tmp_path, tokenizer) == [END, 5]
