"""The three models of a comparison, and their answers to a prompt.

Where memory allows, all three stay loaded, and a tensor that two of them share is held once:

    base        embed  W1   W2   norm
    fine-tune     |    W1'  W2'   |      -> of what did not change, the base's copy
    restored      |    W1~  W2~   |

Where it does not, each model is loaded for its answer and let go again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from deltafold.archive import Archive, is_archive
from deltafold.calibration.models import quiet
from deltafold.checkpoint import open_checkpoint
from deltafold.comparing.request import check_prompt
from deltafold.errors import CheckpointError, UsageError
from deltafold.evaluation.loading import (
    choose_device,
    choose_dtype,
    end_token_ids,
    load_tokenizer,
    loaded,
    model_folder,
)
from deltafold.evaluation.plan import context_limit
from deltafold.evaluation.segments import Subject
from deltafold.restoring.decode import check_codecs
from deltafold.restoring.ground import fitted_base
from deltafold.running.memory import total_memory_bytes

NAMES = ("base", "fine-tune", "restored")
SHARE_OF_MEMORY = 0.5
"""Three models stay loaded if they take no more than this of the machine's memory."""


@dataclass(frozen=True)
class Answer:
    """What one model wrote. `n_bytes`: what is stored of it; `seconds` are those of generation."""

    name: str
    text: str
    tokens: int
    seconds: float
    n_bytes: int


class Trio:
    """Base, fine-tune and archive, checked to belong together before a model is loaded.

    >>> with Trio("base/", "math/", "math.delta") as trio:                      # doctest: +SKIP
    ...     for answer in trio.ask("12 + 7 ="):
    ...         print(answer.name, answer.text)
    """

    def __init__(
        self,
        base: str | Path,
        finetuned: str | Path,
        archive: str | Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
    ):
        """Raises UsageError, CheckpointError, ArchiveError, MismatchError."""
        self._dtype, self._device = choose_dtype(dtype), choose_device(device)
        if not is_archive(archive):
            raise UsageError(f"{archive} is no archive; give the folder that compress wrote.")
        with Archive(archive) as opened, open_checkpoint(base) as ground:
            check_codecs(opened)
            fitted_base(opened, ground)
            archive_bytes, base_bytes = opened.n_bytes, ground.total_bytes
            tuned_bytes = opened.manifest.finetuned.total_bytes
        self.sources = dict(zip(NAMES, (base, finetuned, archive), strict=True))
        self.sizes = dict(zip(NAMES, (base_bytes, tuned_bytes, archive_bytes), strict=True))
        for source in (base, finetuned):
            model_folder(source)
        self._tokenizers = self._read_tokenizers()
        self._end_ids = end_token_ids(finetuned, self._tokenizers["fine-tune"])
        self.keeps = self.sizes["base"] + 2 * tuned_bytes < SHARE_OF_MEMORY * total_memory_bytes()
        self._kept: dict[str, Subject] = {}
        self._open = ExitStack()

    def _read_tokenizers(self) -> dict[str, Any]:
        """The fine-tune's, also for what is restored; the base's own where it has one."""
        with quiet():
            tuned = load_tokenizer(self.sources["fine-tune"])
            try:
                base = load_tokenizer(self.sources["base"])
            except CheckpointError as error:
                if error.passing:
                    raise
                base = tuned
        return {"base": base, "fine-tune": tuned, "restored": tuned}

    def __enter__(self) -> Trio:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        self._open.close()

    @property
    def file_ratio(self) -> float:
        """Bytes of the fine-tune / bytes of the archive, everything counted."""
        return self.sizes["fine-tune"] / self.sizes["restored"]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizers["fine-tune"].chat_template)

    def ask(self, prompt: str, max_new_tokens: int = 64, chat: bool = False) -> Iterator[Answer]:
        """The greedy answers of all three, one after another as they are there.

        `chat` puts the prompt into the fine-tune's chat template. Raises UsageError.
        """
        check_prompt(prompt)
        if max_new_tokens < 1:
            raise UsageError(f"{max_new_tokens} tokens are too few; ask for at least 1.")
        if chat and not self.has_chat_template:
            raise UsageError("The fine-tune has no chat template; ask without --chat.")
        for name in NAMES:
            with self._model(name) as subject:
                yield self._answer(name, subject, prompt, max_new_tokens, chat)

    @contextmanager
    def _model(self, name: str) -> Iterator[Subject]:
        if name in self._kept:
            yield self._kept[name]
            return
        source, base = self.sources[name], self.sources["base"]
        with quiet():
            held = loaded(name, source, base, self._dtype, self._device)
            if not self.keeps:
                with held as subject:
                    yield subject
                return
            subject = self._open.enter_context(held)
        for other in self._kept.values():
            share_equal(other.model, subject.model)
        self._kept[name] = subject
        yield subject

    @torch.inference_mode()
    def _answer(
        self, name: str, subject: Subject, prompt: str, max_new_tokens: int, chat: bool
    ) -> Answer:
        tokenizer = self._tokenizers[name]
        ids = self._ids(tokenizer, prompt, chat)
        limit = context_limit(subject)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise UsageError(
                f"The {name} takes {limit:,} tokens, but the prompt has {len(ids):,} and "
                f"{max_new_tokens:,} are to be written; shorten the prompt."
            )
        rows = subject.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise UsageError(f"The {name} does not know a token of this prompt; say it otherwise.")
        start = time.perf_counter()
        given = torch.tensor([ids], device=subject.device)
        ends = self._end_ids or None
        made = subject.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=ends[0] if ends else 0,
            ),
        )[0, len(ids) :].tolist()
        text = tokenizer.decode(made, skip_special_tokens=True)
        return Answer(name, text, len(made), time.perf_counter() - start, self.sizes[name])

    def _ids(self, tokenizer: Any, prompt: str, chat: bool) -> list[int]:
        if not chat:
            return list(tokenizer(prompt).input_ids)
        template = self._tokenizers["fine-tune"].chat_template
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False).input_ids)


def share_equal(one: Any, two: Any) -> int:
    """Let two models hold equal parameters once; returns the bytes saved."""
    known, saved = dict(one.named_parameters()), 0
    for name, mine in two.named_parameters():
        theirs = known.get(name)
        if (
            theirs is not None
            and theirs.dtype == mine.dtype
            and theirs.shape == mine.shape
            and theirs.data_ptr() != mine.data_ptr()
            and torch.equal(theirs, mine)
        ):
            mine.data = theirs.data
            saved += mine.numel() * mine.element_size()
    return saved
