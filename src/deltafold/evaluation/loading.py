"""Models and the tokenizer, ready to be measured: from a Hugging Face folder or an archive.

transformers is imported where it is used: a run that measures nothing does not wait for it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deltafold.archive import is_archive
from deltafold.calibration.models import load_folder, no_config
from deltafold.checkpoint import local_folder
from deltafold.checkpoint.kinds import refuse_other_kinds
from deltafold.composed.load import is_shared, load_shared
from deltafold.errors import CheckpointError, UsageError, nearest
from deltafold.evaluation.segments import Subject
from deltafold.foreign import blamed, first_line, shortage
from deltafold.running.devices import AUTO, CPU, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
    "*.spm",
)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `fp32`; a dtype without a short name keeps its own."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def choose_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name; None for `auto`, a model's own. Raises UsageError."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}; {nearest(name, ['auto', *DTYPES])}")
    return DTYPES.get(name)


def choose_device(device: str | None) -> str:
    """What is asked for, else `cuda` if there is one. Raises UsageError when it is not there."""
    return resolve(device or AUTO)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder. Raises CheckpointError when the folder has none."""
    folder = local_folder(source)
    # Without these files transformers may build an empty tokenizer from the config alone.
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} holds no tokenizer; copy the tokenizer files of its base into it."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise blamed(
            error,
            CheckpointError(
                f"The tokenizer in {source} cannot be loaded ({first_line(error)}); "
                "copy the tokenizer files of its base into it."
            ),
        ) from error


@contextlib.contextmanager
def loaded(
    label: str, source: str | Path, base: str | Path | None, dtype: torch.dtype | None, device: str
) -> Iterator[Subject]:
    """A model in memory for the length of the `with` block, then freed.

    `dtype` None keeps the stored one. An archive needs `base`. Raises DeltafoldError.
    """
    from transformers import GenerationConfig

    archive = is_archive(source)
    model = _load_archive(source, base, dtype) if archive else _load_folder(source, dtype)
    model = model.to(device).eval()
    # The folder's own sampling defaults (temperature, penalties) must not shape greedy answers.
    model.generation_config = GenerationConfig()
    subject = Subject(label, model)
    try:
        yield subject
    finally:
        # The caller still names the subject until it rebinds it, so its weights are let go here.
        del model
        subject.model = None
        gc.collect()
        if device != CPU:
            torch.cuda.empty_cache()


def _load_archive(source: str | Path, base: str | Path | None, dtype: torch.dtype | None) -> Any:
    from deltafold.restoring.load import load_archive

    if base is None:
        raise UsageError(f"{source} is an archive, so its base is needed; give it with --base.")
    return load_archive(Path(source).expanduser(), base=base, causal=True, dtype=dtype or "auto")


def model_folder(source: str | Path) -> Path:
    """The folder of an ordinary model, downloaded first if need be. Raises CheckpointError."""
    folder = local_folder(source)
    if not (folder / "config.json").is_file():
        refuse_other_kinds(folder, str(source))
        raise CheckpointError(no_config(folder, str(source)))
    return folder


def _load_folder(source: str | Path, dtype: torch.dtype | None) -> Any:
    folder = model_folder(source)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if is_shared(folder):
        return load_shared(folder, causal=True, **options)
    return load_folder(folder, str(source), **options)


def end_token_ids(source: str | Path, tokenizer: Any) -> list[int]:
    """Every token at which the fine-tune stops: of its tokenizer and of its generation config."""
    from transformers import GenerationConfig

    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        configured = GenerationConfig.from_pretrained(local_folder(source)).eos_token_id
    except (OSError, ValueError) as error:  # most often there is no such file
        if (lacking := shortage(error)) is not None:
            raise lacking from error
        configured = None
    if configured is not None:
        ids += configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(ids))
