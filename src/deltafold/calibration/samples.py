"""Calibration text: from a file, from a data set, or written by the fine-tune itself.

    rows.jsonl              {"prompt", "answer"}, {"question", "answer"}, {"text"} or {"messages"}
    any other file          plain text, cut at blank lines
    datasets:NAME[:SPLIT[:FIELD]]   rows of a data set, through the package `datasets`
    general                 24 pages of many kinds that come with the package (`general.jsonl`)
    pages                   these and more, for what fits many numbers (`pages.jsonl`)
    self                    see `selftext.py`

What is more than asked for is thinned out by the seed, not cut off at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from deltafold.calibration.batches import Sample
from deltafold.calibration.tokens import Encoder
from deltafold.coding.counter import derive_key, subset
from deltafold.errors import DeltafoldError, UsageError
from deltafold.foreign import blamed, first_line, unread

CHARACTERS_A_TOKEN = 6
"""Windows of a plain text are cut this long for each token wanted, then to the token."""

GENERAL, PAGES = "general", "pages"
GENERAL_TOKENS = 128
"""Tokens of each of the 24 samples of `general`."""

WHOLE_PAGE = 4096
"""No page that comes with the package has more tokens."""

Row = dict[str, Any]


class SampleError(DeltafoldError):
    """Calibration text that cannot be used."""


def check_limits(samples: int, max_tokens: int) -> None:
    """Raises UsageError for limits that leave nothing."""
    for name, value, least in (("samples", samples, 1), ("max_tokens", max_tokens, 2)):
        if value < least:
            raise UsageError(f"{value} {name.replace('_', ' ')} is too few; give at least {least}.")


def general_samples(encoder: Encoder) -> list[Sample]:
    """The short text that comes with the package. All its tokens count."""
    return [Sample(each.ids[:GENERAL_TOKENS]) for each in _built_in("general.jsonl", encoder)]


def page_samples(encoder: Encoder, samples: int, seed: int) -> list[Sample]:
    """At most `samples` pieces of all pages that come with the package. All their tokens count.

    A page that is longer than a sample may be gives several.
    """
    whole = Encoder(encoder.tokenizer, WHOLE_PAGE)
    length = encoder.max_tokens
    found = [
        Sample(page.ids[start : start + length])
        for name in ("pages.jsonl", "general.jsonl")
        for page in _built_in(name, whole)
        for start in range(0, len(page.ids) - 1, length)
    ]
    chosen = subset(derive_key(seed, "calibration samples"), 0, len(found), samples)
    return [found[int(number)] for number in chosen]


def _built_in(name: str, encoder: Encoder) -> list[Sample]:
    """Samples of a file of the package, of the encoder's length."""
    rows = resources.files("deltafold.calibration").joinpath(name).read_text("utf-8")
    found = []
    for line in rows.splitlines():
        row = json.loads(line)
        try:
            made = _sample(row, encoder, name)
        except SampleError:  # no chat template, or one that is particular
            made = encoder.text("\n\n".join(turn["content"] for turn in row["messages"]))
        if made is not None:
            found.append(Sample(made.ids))
    if not found:
        raise SampleError("The tokenizer makes no tokens of text; give --calibration none.")
    return found


def read_samples(source: str | Path, encoder: Encoder, samples: int, seed: int) -> list[Sample]:
    """At most `samples` samples of a file or a data set, in its order. Raises SampleError."""
    text = str(source)
    if text.startswith("datasets:"):
        return _chosen(*_data_set(text), encoder, samples, seed)
    path = Path(source).expanduser()
    raw = _decode(path)
    if path.suffix.lower() in (".jsonl", ".ndjson") or raw.lstrip()[:1] == "{":
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        lines = [(n, line) for n, line in enumerate(raw.split("\n"), start=1) if line.strip()]

        def row(number: int) -> Row:
            return _parse(lines[number][1], f"{path}, line {lines[number][0]}")

        def place(number: int) -> str:
            return f"{path}, line {lines[number][0]}"

        return _chosen(len(lines), row, place, encoder, samples, seed)
    windows = list(cut_windows(raw, CHARACTERS_A_TOKEN * encoder.max_tokens))
    return _chosen(
        len(windows),
        lambda number: {"text": windows[number]},
        lambda number: str(path),
        encoder,
        samples,
        seed,
    )


def cut_windows(text: str, length: int) -> Iterator[str]:
    """Pieces of about `length` characters, cut at blank lines, else at white space.

    >>> list(cut_windows("one two\\n\\nthree\\n\\nfour", 14))
    ['one two\\n\\nthree', 'four']
    """
    held = ""
    for paragraph in text.split("\n\n"):
        joined = f"{held}\n\n{paragraph}" if held else paragraph
        if held and len(joined) > length:
            yield held
            joined = paragraph
        while len(joined) > length:
            at = max(joined.rfind(" ", 0, length), joined.rfind("\n", 0, length))
            at = at if at > 0 else length
            yield joined[:at]
            joined = joined[at:].lstrip()
        held = joined
    if held.strip():
        yield held


def _chosen(
    total: int,
    row: Callable[[int], Row],
    place: Callable[[int], str],
    encoder: Encoder,
    samples: int,
    seed: int,
) -> list[Sample]:
    """Samples of `samples` rows drawn by the seed; rows without tokens are passed over."""
    key = derive_key(seed, "calibration samples")
    chosen = subset(key, 0, total, samples)
    made = [_sample(row(int(n)), encoder, place(int(n))) for n in chosen]
    found = [each for each in made if each is not None]
    if not found:
        where = place(0).partition(", ")[0] if total else "The calibration text"
        raise SampleError(f"{where} holds no text to calibrate on; give some hundred words.")
    return found


def _sample(row: Row, encoder: Encoder, where: str) -> Sample | None:
    messages = row.get("messages")
    if messages is not None:
        return _chat(messages, encoder, where)
    field = next((each for each in ("prompt", "question", "text") if each in row), None)
    if field is None:
        raise SampleError(
            f'{where}: the row has no "prompt", "question", "text" or "messages" (it has '
            f"{', '.join(map(str, row)) or 'no fields'}); name one of them so."
        )
    answer = row.get("answer") if field != "text" else None
    choices = row.get("choices")
    if type(answer) is int and isinstance(choices, list) and 0 <= answer < len(choices):
        answer = choices[answer]
    for name, value in ((field, row[field]), ("answer", answer)):
        if not isinstance(value, str) and not (name == "answer" and value is None):
            raise SampleError(f'{where}: "{name}" is not a text; put a text in quotes there.')
    return encoder.text(row[field]) if answer is None else encoder.answer(row[field], answer)


def _chat(messages: object, encoder: Encoder, where: str) -> Sample | None:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(each, dict) and {"role", "content"} <= set(each) for each in messages)
    ):
        raise SampleError(
            f'{where}: "messages" is not a list of {{"role": ..., "content": ...}}; fix it.'
        )
    try:
        return encoder.chat(messages)
    except Exception as error:  # templates are programs, and fail in their own ways
        raise blamed(
            error,
            SampleError(
                f"{where}: the fine-tune's chat template does not take these messages "
                f"({first_line(error)}); give prompts and answers instead."
            ),
        ) from error


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error}); give one JSON object a line.") from None
    if not isinstance(row, dict):
        raise SampleError(f"{where}: not a JSON object; give fields such as prompt and answer.")
    return row


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise unread(error, path, SampleError) from None
    except UnicodeDecodeError as error:
        raise SampleError(
            f"{path} is not UTF-8 (byte {error.start:,} cannot be read); save it as UTF-8."
        ) from None


def _data_set(source: str) -> tuple[int, Callable[[int], Row], Callable[[int], str]]:
    """(rows, row by number, place by number) of `datasets:NAME[:SPLIT[:FIELD]]`."""
    name, split, field = (*source.removeprefix("datasets:").split(":"), "", "")[:3]
    try:
        import datasets  # an extra
    except ImportError:
        raise SampleError(
            f"{source} needs the package datasets (pip install 'deltafold[datasets]'), or give a "
            "file of texts."
        ) from None
    try:
        rows: Sequence[Row] = datasets.load_dataset(name, split=split or "train")
        total = len(rows)
    except Exception as error:  # the library raises many kinds; the user needs one sentence
        raise blamed(
            error,
            SampleError(
                f"{source} cannot be loaded ({first_line(error)}); check the name, the split "
                "(datasets:NAME:SPLIT) and your network."
            ),
        ) from error

    def row(number: int) -> Row:
        found = dict(rows[number])
        if field and field not in found:
            raise SampleError(
                f"{source}: rows have no field {field!r}, only {', '.join(found)}; name one."
            )
        return {"text": found[field]} if field else found

    return total, row, lambda number: f"{source}, row {number}"
