"""`compare`: prompts answered one after another, or a page that stays open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltafold.comparing.request import CompareRequest
from deltafold.comparing.trio import Answer, Trio


@dataclass(frozen=True)
class Answers:
    """What the three write, as it is there."""

    trio: Trio
    request: CompareRequest

    def __iter__(self) -> Iterator[tuple[str, Answer]]:
        """(prompt, answer), three of each prompt; models are let go of in the end."""
        with self.trio:
            for prompt in self.request.prompt:
                for answer in self.trio.ask(prompt, self.request.max_new_tokens, self.request.chat):
                    yield prompt, answer

    def to_json(self) -> list[dict[str, Any]]:
        """As plain values, all of them."""
        return [{"prompt": prompt} | asdict(answer) for prompt, answer in self]


@dataclass(frozen=True)
class OpenPage:
    """A page that answers until it is closed."""

    url: str
    page: Any
    open_models: ExitStack

    def stay(self) -> None:
        """Until Ctrl-C."""
        with self.open_models:
            self.page.block_thread()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"url": self.url}


def run_compare(request: CompareRequest) -> Answers | OpenPage:
    """What is asked; see `CompareRequest`. Raises DeltafoldError."""
    trio = Trio(
        request.base, request.finetuned, request.archive, dtype=request.dtype, device=request.device
    )
    if request.prompt:
        return Answers(trio, request)
    from deltafold.comparing.page import serve

    with ExitStack() as stack:
        stack.enter_context(trio)
        page, url = serve(trio, Path(request.archive).name, request.port, wait=False)
        return OpenPage(url, page, stack.pop_all())
