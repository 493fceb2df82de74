"""A composed model in memory, ready to run: the package's own classes, no code from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltafold.composed.form import KEY, read_form
from deltafold.composed.modeling import composed_class
from deltafold.errors import CheckpointError, MismatchError


def is_shared(folder: str | Path) -> bool:
    """True for the folder of a composed model: its config holds a form."""
    try:
        return KEY in json.loads((Path(folder).expanduser() / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_shared(folder: str | Path, **from_pretrained: Any) -> Any:
    """The model of a folder that `share` or `factor` wrote. Raises CheckpointError, MismatchError.

    `from_pretrained` takes what `AutoModelForCausalLM.from_pretrained` takes.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where = Path(folder).expanduser()
    config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    read_form({KEY: config.deltafold}, str(folder))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MismatchError(
            f"transformers has no causal language model for {config.model_type!r}; install the "
            "version that the model was made with."
        )
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = composed_class(base)
    options = {"dtype": "auto", "local_files_only": True} | from_pretrained
    try:
        model, info = kind.from_pretrained(
            where, config=config, output_loading_info=True, **options
        )
    except (AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({str(error).splitlines()[0]}); config and weights do not "
            "belong together, or it was written by another version."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks the weight {missing[0]} ({len(missing)} missing in all); copy it again."
        )
    return model.eval()
