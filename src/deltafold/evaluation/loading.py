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
from deltafold.checkpoint import local_folder
from deltafold.composed.load import is_shared, load_shared
from deltafold.errors import CheckpointError, DeltafoldError, UsageError, nearest
from deltafold.evaluation.segments import Subject
from deltafold.running.devices import AUTO, CPU, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading chatter of transformers, and give it its voice back afterwards."""
    import transformers

    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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
        raise CheckpointError(
            f"The tokenizer in {source} cannot be loaded ({_first_line(error)}); "
            "copy the tokenizer files of its base into it."
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
    return load_archive(Path(source).expanduser(), base=base, dtype=dtype or "auto")


def model_folder(source: str | Path) -> Path:
    """The folder of an ordinary model, downloaded first if need be. Raises CheckpointError."""
    folder = local_folder(source)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{source} holds no config.json; give a whole Hugging Face folder "
            "(config, weights, tokenizer)."
        )
    return folder


def _load_folder(source: str | Path, dtype: torch.dtype | None) -> Any:
    folder = model_folder(source)
    from transformers import AutoModelForCausalLM

    if is_shared(folder):
        return load_shared(folder, dtype=dtype or "auto")
    try:
        # Any: with output_loading_info it is a pair, which the annotation of the library omits.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
        model, info = pair
    except DeltafoldError:
        raise
    except Exception as error:  # the many ways in which a folder can be broken
        raise CheckpointError(
            f"{source} cannot be loaded as a causal language model ({_first_line(error)}); "
            "check its config.json and weight files."
        ) from error
    # transformers fills missing weights with random numbers; a measurement of those is worthless.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks the weight {missing[0]} ({len(missing)} missing in all); "
            "copy or download it again."
        )
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def end_token_ids(source: str | Path, tokenizer: Any) -> list[int]:
    """Every token at which the fine-tune stops: of its tokenizer and of its generation config."""
    from transformers import GenerationConfig

    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        configured = GenerationConfig.from_pretrained(local_folder(source)).eos_token_id
    except (OSError, ValueError):  # most often there is no such file
        configured = None
    if configured is not None:
        ids += configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(ids))
