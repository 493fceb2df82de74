"""The modelling file beside the weights: the layers' own source, and the class of the model."""

from __future__ import annotations

from importlib import resources
from typing import Any

from deltafold.composed.form import KEY, Form

MODULE = "modeling_deltafold"


def modelling_file(base: type) -> str:
    """The text of `modeling_deltafold.py` for a model class of transformers."""
    source = resources.files("deltafold.composed").joinpath("modeling.py").read_text("utf-8")
    return (
        f"{source}\n\nfrom {base.__module__} import {base.__name__}  # noqa: E402\n\n"
        f"Deltafold{base.__name__} = composed_class({base.__name__})\n"
    )


def _auto_class(base: type) -> str:
    """The class of transformers that opens models of this class: AutoModelForCausalLM, AutoModel, ..."""
    from transformers.models.auto import modeling_auto

    if base.__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    for name, each in sorted(vars(modeling_auto).items()):
        known = getattr(getattr(each, "_model_mapping", None), "_model_mapping", None)
        if name.startswith("AutoModelFor") and base.__name__ in dict(known or {}).values():
            return name
    return "AutoModel"


def shared_config(config: dict[str, Any], form: Form, base: type) -> dict[str, Any]:
    """The config of the composed model: the form, and where its class is found."""
    name = f"Deltafold{base.__name__}"
    return {
        **config,
        "architectures": [name],
        "auto_map": {_auto_class(base): f"{MODULE}.{name}"},
        KEY: form.to_json(),
    }
