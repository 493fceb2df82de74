"""Whose vocabulary a merged model has, and where each of its rows comes from.

A row of the embedding (and of the head) belongs to a token. Tokens are told apart by their text, not
by their number: fine-tunes add tokens of their own, often at the same place. Rows that no tokenizer
names, mostly padding, are known by their number.

    base     <s> a b          base's choice    <s> a b
    chat     <s> a b <user>   union            <s> a b <user> <tool>
    tools    <s> a b <tool>   chat's choice    <s> a b <user>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deltafold.errors import MismatchError

Key = str | int
"""The text of a token, or the number of a row that has none."""
SHOWN = 4  # tokens named in a note


@dataclass(frozen=True)
class Vocabulary:
    """The rows of one model. `tokens[n]` is the text of row n, None where the tokenizer has none.

    `added` are the texts that were added to the vocabulary proper, the only ones that a union can
    take over. `known` is False where there is no tokenizer to ask.
    """

    label: str
    rows: int
    tokens: dict[int, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    known: bool = True

    def names(self) -> list[Key]:
        """What each row is called, each by another name: a text that comes twice names its first."""
        found: list[Key] = []
        seen: set[Key] = set()
        for row in range(self.rows):
            key: Key = self.tokens.get(row, row)
            found.append(row if key in seen else key)
            seen.add(key)
        return found

    @property
    def first_free(self) -> int:
        """The row after the last one that has a name: where a new token goes."""
        return max(self.tokens, default=self.rows - 1) + 1


@dataclass(frozen=True)
class Settled:
    """The merged vocabulary. `base_rows[j]` is the base's row for row j, -1 where it has none;
    `model_rows` the same for each model. `new` are (token, model's number, its row there, its row
    here) of tokens taken over from models. `notes` say in words what is not as in every model.
    `is_plain` is true where every row is the row of the same number in base and models.
    """

    choice: str
    rows: int
    base_rows: list[int]
    model_rows: list[list[int]]
    new: list[tuple[str, int, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_plain: bool = True


def settle(base: Vocabulary, models: Sequence[Vocabulary], choice: str | None = None) -> Settled:
    """Decide on the rows. `choice`: `base` (also None), `union`, or the label of a model.

    Raises MismatchError where a union cannot be made.
    """
    models = [_named_like(base, model) for model in models]
    new: list[tuple[str, int, int, int]] = []
    if choice == "union":
        keys, new = _union(base, models)
    else:
        owner = next((model for model in models if model.label == choice), base)
        keys = owner.names()
    return Settled(
        choice or "base",
        len(keys),
        _places(keys, base),
        [_places(keys, model) for model in models],
        new,
        _notes(keys, base, models, choice),
        all(each.names() == keys for each in (base, *models)),
    )


def _named_like(base: Vocabulary, model: Vocabulary) -> Vocabulary:
    """A model that came without a tokenizer is taken to use the base's."""
    if model.known or not base.known:
        return model
    tokens = {row: text for row, text in base.tokens.items() if row < model.rows}
    return Vocabulary(model.label, model.rows, tokens, base.added, known=False)


def _places(keys: Sequence[Key], of: Vocabulary) -> list[int]:
    own = {key: row for row, key in enumerate(of.names())}
    return [own.get(key, -1) for key in keys]


def _union(
    base: Vocabulary, models: Sequence[Vocabulary]
) -> tuple[list[Key], list[tuple[str, int, int, int]]]:
    """The base's rows, then what models added, in their order; a token is taken once."""
    keys, new, taken = base.names(), [], set(base.tokens.values())
    place = base.first_free
    for number, model in enumerate(models):
        if model.rows > base.rows and not (model.known and base.known):
            missing = (model if base.known else base).label
            raise MismatchError(
                f"{missing} has no tokenizer.json, so it is not known what the "
                f"{model.rows - base.rows} extra rows of {model.label} mean; copy the file there, or "
                "choose another --tokenizer."
            )
        for row, text in sorted(model.tokens.items()):
            if text in taken or row >= model.rows:
                continue
            if text not in model.added:
                raise MismatchError(
                    f"The token {text!r} of {model.label} belongs to another vocabulary, not to "
                    f"tokens added to that of {base.label}; a union of the two cannot be made: "
                    "choose one with --tokenizer."
                )
            keys[place : place + 1] = [text]
            new.append((text, number, row, place))
            taken.add(text)
            place += 1
    return keys, new


def _notes(
    keys: Sequence[Key], base: Vocabulary, models: Sequence[Vocabulary], choice: str | None
) -> list[str]:
    kept, found = set(keys), []
    for model in models:
        if dropped := _worth_telling([key for key in model.names() if key not in kept]):
            remedy = "" if choice == "union" else "; --tokenizer union keeps added tokens"
            found.append(
                f"{_listed(dropped)} of {model.label} left out: the vocabulary is "
                f"{_whose(base, choice)}{remedy}."
            )
    if lost := [key for key in base.names() if key not in kept and isinstance(key, str)]:
        found.append(f"{_listed(lost)} of {base.label} left out: the vocabulary is {choice}'s.")
    of_base = set(base.names())
    if extra := _worth_telling([key for key in keys if key not in of_base]):
        found.append(
            f"{_listed(extra)} not in {base.label}: the mean of the models that have them."
        )
    return found


def _worth_telling(keys: Sequence[Key]) -> Sequence[Key]:
    """Rows without a token are padding wherever others have one."""
    return [key for key in keys if isinstance(key, str)] or keys


def _whose(base: Vocabulary, choice: str | None) -> str:
    if choice == "union":
        return "the union"
    return f"that of {base.label}" if choice in (None, "base") else f"that of {choice}"


def _listed(keys: Sequence[Key]) -> str:
    """In words: `2 tokens (<a>, <b>)`, `64 rows without a token`."""
    texts = [key for key in keys if isinstance(key, str)]
    if not texts:
        return f"{len(keys)} row{'s' * (len(keys) > 1)} without a token"
    shown = ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
    return f"{len(texts)} token{'s' * (len(texts) > 1)} ({shown})"
