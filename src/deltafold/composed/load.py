"""A composed model in memory, ready to run: the package's own classes, no code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltafold.calibration.models import class_of, config_of, load_composed
from deltafold.checkpoint.json_files import read_config
from deltafold.composed.form import KEY, read_form
from deltafold.composed.modeling import composed_class
from deltafold.errors import CheckpointError


def is_shared(folder: str | Path) -> bool:
    """True for the folder of a composed model: its config holds a form."""
    try:
        return KEY in read_config(Path(folder).expanduser())
    except CheckpointError:  # said by whoever needs the config
        return False


def load_shared(folder: str | Path, *, causal: bool = False, **from_pretrained: Any) -> Any:
    """The model of a folder that `share` or `factor` wrote; with `causal` one of language.

    `from_pretrained` takes what `AutoModelForCausalLM.from_pretrained` takes. Raises CheckpointError,
    MismatchError.
    """
    where = Path(folder).expanduser()
    config = config_of(where, str(folder))
    read_form({KEY: config.deltafold}, str(folder))
    kind = composed_class(class_of(config, str(folder), causal))
    options = {"config": config, "dtype": "auto"} | from_pretrained
    return load_composed(kind, where, str(folder), **options).eval()
