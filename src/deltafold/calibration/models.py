"""The class of a checkpoint's model, and whole models in memory: the one place that picks and loads.

The class is the first of the config's `architectures`: a classifier is no causal language model that
happens to lack a head. Code that comes with a checkpoint is never run. transformers fills weights
that are missing with random numbers and drops those that it has no place for; here both are refused
by name.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deltafold.checkpoint.json_files import read_config
from deltafold.errors import CheckpointError, MismatchError
from deltafold.foreign import blamed, first_line
from deltafold.running.neutral import with_values

COMPOSED = "Deltafold"
"""What stands before the class of a composed model, see `composed/standalone.py`."""
_WITHOUT_TEXT = (
    "compress, restore, verify and merge take it without text, and fold, export and factor "
    "(--method svd) where its blocks allow it"
)
# Buffers that older versions stored and newer ones compute.
_COMPUTED = re.compile(r"(?:position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias)$")


def config_of(folder: Path, label: str | None = None) -> Any:
    """The config of a folder, as transformers has it. Raises CheckpointError."""
    label = label or str(folder)
    found = read_config(folder)
    if not found:
        raise CheckpointError(no_config(folder, label))
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = found.get("model_type")
    if model_type not in CONFIG_MAPPING:
        named = "names no model type" if model_type is None else f"is of type {model_type!r}"
        if isinstance(found.get("_class_name"), str):
            named = f"is that of a {found['_class_name']} of diffusers"
        code = "; code that lies in the folder is not run" if "auto_map" in found else ""
        raise CheckpointError(
            f"The config of {label} cannot be read: it {named}, and transformers "
            f"{transformers.__version__} has no such model{code}; compress, restore and merge take it "
            "as it is."
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        raise blamed(
            error,
            CheckpointError(
                f"The config of {label} cannot be read by transformers ({first_line(error)}); check it."
            ),
        ) from error


def no_config(folder: Path, label: str) -> str:
    """Why there is no model to be built, in one sentence."""
    if folder.is_file():
        return (
            f"{label} is a single file and holds no config.json; give the folder that it lies in."
        )
    if (folder / "model_index.json").is_file():
        return (
            f"{label} is a pipeline of diffusers and holds no config.json of its own; compress, "
            "restore, verify and merge take it."
        )
    return f"{label} holds no config.json, which says what model it is; put it there."


def class_of(config: Any, label: str, causal: bool = True) -> Any:
    """The transformers class of a config; with `causal` one that predicts the next token of a text.

    Raises MismatchError.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = getattr(config, "architectures", None) or [""]
    name = str(names[0]).removeprefix(COMPOSED if hasattr(config, "deltafold") else "")
    kind: Any = _known(name, config)
    spelled = not name or name.lower().endswith("forcausallm")
    if kind is None and spelled and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind is None and causal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MismatchError(
            f"{label}: transformers has no causal language model for {config.model_type!r}, so no text "
            f"can be run through it; {_WITHOUT_TEXT}."
        )
    if kind is None:
        what = f"a {name}, which is no class of transformers for" if name else "no architecture for"
        raise MismatchError(
            f"{label}: its config names {what} {config.model_type!r}, so no model can be built; "
            "restore it, and load it with its own code."
        )
    if causal and not is_causal(kind, config):
        raise MismatchError(
            f"{label} is a {kind.__name__}, no causal language model, so no text can be run through it "
            f"here; {_WITHOUT_TEXT}."
        )
    return kind


def _known(name: str, config: Any) -> Any:
    """The class of this name, if transformers has it and it is for such configs."""
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    wanted = getattr(kind, "config_class", None)
    return kind if wanted is None or isinstance(config, wanted) else None


def is_causal(kind: Any, config: Any) -> bool:
    """Whether models of this class predict the next token of a text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    talks = kind.__name__.endswith("ForConditionalGeneration") and kind.can_generate()
    return bool(talks and not getattr(config, "is_encoder_decoder", False))


def load_folder(
    folder: Path, label: str | None = None, *, causal: bool = True, **from_pretrained: Any
) -> Any:
    """The whole model of a folder. Raises CheckpointError, MismatchError."""
    label = label or str(folder)
    config = config_of(folder, label)
    kind = class_of(config, label, causal)
    options = {"config": config, "local_files_only": True} | from_pretrained
    return _loaded(kind, folder, label, options)


def load_weights(
    config: Any,
    state: Mapping[str, torch.Tensor],
    label: str,
    *,
    causal: bool = True,
    **from_pretrained: Any,
) -> Any:
    """The model of a config and of tensors in memory, in their stored shapes, by checkpoint name.

    Raises CheckpointError, MismatchError.
    """
    kind = class_of(config, label, causal)
    options = {"config": config, "state_dict": dict(state)} | from_pretrained
    return _loaded(kind, None, label, options)


def load_composed(kind: Any, folder: Path, label: str, **from_pretrained: Any) -> Any:
    """A folder's model by a class that is made for it. Raises CheckpointError."""
    return _loaded(kind, folder, label, {"local_files_only": True} | from_pretrained)


def _loaded(kind: Any, folder: Path | None, label: str, options: dict[str, Any]) -> Any:
    try:
        with quiet(), with_values():
            model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # the many ways in which a folder can be broken
        raise blamed(
            error,
            CheckpointError(
                f"{label} cannot be loaded as a {kind.__name__} ({first_line(error)}); check its "
                "config.json and weight files."
            ),
        ) from error
    check_keys(model, info, label)
    return model


def check_keys(model: Any, info: Mapping[str, Any], label: str) -> None:
    """Refuse what transformers would only warn of. `info` is its report. Raises CheckpointError."""
    name = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{label} lacks the weight {missing[0]} ({len(missing)} missing in all) that a {name} "
            "has; a file is missing, or config and weights do not belong together."
        )
    if mismatched := sorted(map(str, info.get("mismatched_keys", ()))):
        raise CheckpointError(
            f"{label}: weights and config do not belong together: {mismatched[0]} is of another "
            f"shape in a {name}."
        )
    if unexpected := unused(model, info["unexpected_keys"]):
        raise CheckpointError(
            f"{label} holds the weight {unexpected[0]} ({len(unexpected)} such in all) that a {name} "
            "has no place for, so it would be dropped; load it with the class or library that it was "
            "trained with."
        )


def unused(model: Any, names: Collection[str]) -> list[str]:
    """Of the names that a model did not take those that are weights, sorted."""
    buffers = {name for name, _ in model.named_buffers()}
    return sorted(name for name in names if name not in buffers and not _COMPUTED.search(name))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, whose advice is for users of whole models, and give it back its voice."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
