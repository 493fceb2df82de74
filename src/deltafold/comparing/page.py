"""The comparison as a page on this machine, by Gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from deltafold.comparing.trio import NAMES, Trio
from deltafold.errors import DeltafoldError, UsageError

STYLE = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.answers textarea { font-family: ui-monospace, Menlo, Consolas, monospace; }
"""


def page(trio: Trio, title: str) -> Any:
    """The page as Gradio blocks. Raises UsageError where Gradio is not installed."""
    gradio = _gradio()
    with gradio.Blocks(title=f"deltafold: {title}", analytics_enabled=False) as made:
        gradio.Markdown(f"# {escaped(title)}\n{escaped(summary(trio))}")
        prompt = gradio.Textbox(label="Prompt", lines=3, autofocus=True)
        with gradio.Row():
            tokens = gradio.Slider(1, 512, value=64, step=1, label="Tokens, at most")
            chat = gradio.Checkbox(
                label="In the fine-tune's chat template",
                value=False,
                interactive=trio.has_chat_template,
            )
        ask = gradio.Button("Ask all three", variant="primary")
        with gradio.Row(elem_classes="answers"):
            boxes = [
                gradio.Textbox(label=f"{name} · {_size(trio.sizes[name])}", lines=8)
                for name in NAMES
            ]

        def answers(text: str, n_tokens: float, in_chat: bool) -> Iterator[list[str]]:
            shown = [""] * len(NAMES)
            try:
                for number, answer in enumerate(trio.ask(text, int(n_tokens), in_chat)):
                    shown[number] = answer.text
                    yield list(shown)
            except DeltafoldError as error:
                raise gradio.Error(str(error), print_exception=False) from None

        for event in (ask.click, prompt.submit):
            # One at a time: the models take turns in memory.
            event(answers, [prompt, tokens, chat], boxes, concurrency_limit=1, concurrency_id="ask")
    return made


def serve(trio: Trio, title: str, port: int | None, wait: bool = True) -> tuple[Any, str]:
    """Open the page on this machine alone; returns it with its address.

    Fonts are those of the system: nothing is fetched from elsewhere. Raises UsageError.
    """
    gradio = _gradio()
    made = page(trio, title)
    theme = gradio.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        _, url, _ = made.queue().launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        raise UsageError(f"Port {port} cannot be used ({error}); give another --port.") from None
    if wait:
        made.block_thread()
    return made, str(url)


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UsageError(
            "The page needs Gradio; install it with pip install 'deltafold[compare]', or give "
            "--prompt TEXT to compare in the terminal."
        ) from None
    return gradio


def summary(trio: Trio) -> str:
    """Sizes in a sentence."""
    return (
        f"The archive holds the fine-tune in {_size(trio.sizes['restored'])} in place of "
        f"{_size(trio.sizes['fine-tune'])}: {trio.file_ratio:.1f}x smaller, everything counted."
    )


def _size(n_bytes: int) -> str:
    from deltafold.reporting.units import bytes_text

    return bytes_text(n_bytes)


def escaped(text: str) -> str:
    """Keep a folder's name from being read as Markdown or HTML."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>#&" else sign for sign in text)
