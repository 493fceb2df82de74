"""The fine-tune's tokenizer: texts, prompts with answers, and chats, as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltafold.calibration.batches import Sample
from deltafold.errors import CheckpointError
from deltafold.foreign import blamed, first_line, shortage

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")


class TextIds:
    """Token ids of text.

    `prefix` is the beginning-of-text token where the tokenizer adds one, else empty.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        bare = self.ids("a")
        full = self._asked("a", add_special_tokens=True)
        begins = tokenizer.bos_token_id is not None and full[:1] == [tokenizer.bos_token_id]
        self.prefix: list[int] = full[:1] if begins and bare[:1] != full[:1] else []

    def ids(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return self._asked(text, add_special_tokens=False)

    def _asked(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # settings of its files that do not fit show only here
            raise blamed(
                error,
                CheckpointError(
                    f"The tokenizer in {getattr(self.tokenizer, 'name_or_path', 'the folder')} takes "
                    f"no text ({first_line(error)}); copy the tokenizer files of its base into it."
                ),
            ) from error

    def beginning(self, text: str) -> list[int]:
        """Token ids of a text that stands first: they begin with `prefix`, which is added once only.

        A text that already begins with the beginning-of-text token, written out, gets no second one.
        """
        ids = self.ids(text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def followed(self, text: str, continuation: str) -> tuple[list[int], int]:
        """Token ids of a text that stands first and of what follows it; where the latter begins.

        Where a tokenizer would merge characters across the seam, the two are tokenised apart.
        """
        before, whole = self.beginning(text), self.beginning(text + continuation)
        if whole[: len(before)] != before or len(whole) == len(before):
            whole = before + self.ids(continuation)
        return whole, len(before)


class Encoder(TextIds):
    """Turns text into samples of at most `max_tokens` tokens."""

    def __init__(self, tokenizer: Any, max_tokens: int):
        super().__init__(tokenizer)
        self.max_tokens = max_tokens

    def text(self, text: str) -> Sample | None:
        """A text of which every token counts but the first; None if it has less than two."""
        ids = self.beginning(text)[: self.max_tokens]
        return Sample(tuple(ids)) if len(ids) > 1 else None

    def answer(self, prompt: str, answer: str) -> Sample | None:
        """A prompt and its answer, whose tokens count; None if one of them has no tokens."""
        return self._cut(*self.followed(prompt, answer))

    def chat(self, messages: list[dict[str, Any]]) -> Sample | None:
        """A chat; the last turn counts if the assistant speaks it, else all tokens do."""
        whole = self._template(messages, False)
        if messages[-1].get("role") == "assistant" and len(messages) > 1:
            before = self._template(messages[:-1], True)
            if whole.startswith(before):
                return self._cut(
                    self.beginning(before) + self.ids(whole.removeprefix(before)),
                    len(self.beginning(before)),
                )
        return self.text(whole)

    def _template(self, messages: list[dict[str, Any]], ask: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        )

    def empty_turn(self) -> tuple[str, str] | None:
        """What the chat template writes before and after a user's words, up to the answer's.

        None where the tokenizer has no template, or one that does not take a lone user's turn.
        """
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            text = self._template([{"role": "user", "content": mark}], True)
        except Exception as error:  # templates are programs, and fail in their own ways
            if (lacking := shortage(error)) is not None:
                raise lacking from error
            return None
        before, found, after = text.partition(mark)
        return (before, after) if found and before else None

    def _cut(self, ids: list[int], start: int) -> Sample | None:
        """At most `max_tokens`: the prompt loses its beginning, then the answer its end."""
        if not 0 < start < len(ids):
            return None
        first = max(0, min(start - 1, len(ids) - self.max_tokens))
        return Sample(tuple(ids[first : first + self.max_tokens]), start - first)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises CheckpointError when the folder has none."""
    from transformers import AutoTokenizer

    # Without these files transformers may build an empty tokenizer from the config alone.
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no tokenizer; copy the tokenizer files of its base into it."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise blamed(
            error,
            CheckpointError(
                f"The tokenizer in {folder} cannot be loaded ({first_line(error)}); "
                "copy the tokenizer files of its base into it."
            ),
        ) from error


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every token at which the model stops: of its tokenizer and of its generation config."""
    from transformers import GenerationConfig

    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError) as error:  # most often there is no such file
        if (lacking := shortage(error)) is not None:
            raise lacking from error
        configured = None
    if configured is not None:
        ids += configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(ids))
