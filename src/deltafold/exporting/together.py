"""Several fine-tunes over one copy of their base, in this process, through PEFT."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import load_folder
from deltafold.checkpoint import local_folder
from deltafold.errors import UsageError, nearest
from deltafold.exporting.kept import Adapter, check_names, find_adapter
from deltafold.running.engine import Progress

BASE = "__base__"  # PEFT's name for a row of a mixed batch without an adapter


class Together:
    """One base in memory and an adapter for each fine-tune. The base answers unless told otherwise.

    >>> model = deltafold.load("llama/", deltas={"math": "math.delta"})         # doctest: +SKIP
    >>> with model.using("math"):                                               # doctest: +SKIP
    ...     model.generate(**inputs)
    >>> model.generate(**inputs, adapter_names=["math", "__base__"])            # doctest: +SKIP

    All else (`device`, `config`, `to`, ...) is the PEFT model's, which is `peft_model`.
    """

    def __init__(self, peft_model: Any, names: tuple[str, ...]):
        self.peft_model, self.names = peft_model, names
        self._using = False

    def __getattr__(self, name: str) -> Any:
        if name == "peft_model":  # not set yet: copying and pickling ask before __init__
            raise AttributeError(name)
        return getattr(self.peft_model, name)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Together]:
        """Answer as this fine-tune inside the `with` block. Raises UsageError for another name."""
        if name not in self.names:
            raise UsageError(f"There is no fine-tune {name!r}; {nearest(name, list(self.names))}")
        before, self._using = (self._using, self.peft_model.active_adapter), True
        self.peft_model.set_adapter(name)
        try:
            yield self
        finally:
            self._using = before[0]
            self.peft_model.set_adapter(before[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._plain(kwargs):
            return self.peft_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; `adapter_names` names a fine-tune for each row."""
        with self._plain(kwargs):
            return self.peft_model.generate(*args, **kwargs)

    def _learned_positions(self) -> bool:
        """True if an adapter changes position embeddings, which are looked up once for all rows."""
        own = self.peft_model.get_input_embeddings()
        return any(
            hasattr(module, "lora_embedding_A")
            and len(module.lora_embedding_A)
            and module is not own
            for module in self.peft_model.modules()
        )

    def _plain(self, kwargs: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        if names := kwargs.get("adapter_names"):
            for name in set(names) - {BASE, *self.names}:
                known = [*self.names, BASE]
                raise UsageError(f"There is no fine-tune {name!r}; {nearest(name, known)}")
            if self._learned_positions():
                raise UsageError(
                    "Rows of different fine-tunes cannot share a batch where positions are learned "
                    f"({self.config.model_type}); answer as one at a time, with `using`."
                )
            return contextlib.nullcontext()
        return contextlib.nullcontext() if self._using else self.peft_model.disable_adapter()


def load_together(
    base: str | Path,
    deltas: Mapping[str, str | Path],
    *,
    rank: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    **from_pretrained: Any,
) -> Together:
    """The base, and an adapter of each archive (or PEFT adapter) of `deltas`, by name.

    Adapters are made by `export`, at most of `rank`, and kept in the cache. Raises UsageError
    without PEFT, and what `export` raises.
    """
    check_names(deltas)
    if find_spec("peft") is None:
        raise UsageError(
            "Fine-tunes are loaded together through PEFT: pip install 'deltafold[peft]'."
        )
    found = [
        find_adapter(name, delta, base, rank=rank, workers=workers, progress=progress)
        for name, delta in deltas.items()
    ]
    folder = local_folder(base)
    made = load_folder(folder, str(base), **({"dtype": "auto"} | from_pretrained))
    return Together(_with_adapters(made, found), tuple(deltas))


def _with_adapters(model: Any, adapters: list[Adapter]) -> Any:
    """The model under PEFT with all adapters, in the model's own dtype."""
    from peft import PeftConfig, PeftModel
    from peft.utils import ModulesToSaveWrapper

    peft_model: Any = None
    with warnings.catch_warnings():
        # PEFT advises to tie the pairs of tied embeddings, for merging; see below.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        for each in adapters:
            config: Any = PeftConfig.from_pretrained(str(each.folder))
            config.inference_mode = True
            # PEFT (0.21) ties the head's pair of the first adapter only, and drops the others'. The
            # files hold the pair at both ends, so that nothing need be tied.
            config.ensure_weight_tying = False
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(
                    model, str(each.folder), each.name, config=config, autocast_adapter_dtype=False
                )
                continue
            peft_model.add_adapter(each.name, config, autocast_adapter_dtype=False)
            peft_model.load_adapter(str(each.folder), each.name, autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(model.dtype)
    for module in peft_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _mix(module)
    return peft_model.eval()


def _mix(wrapper: Any) -> None:
    """Let a norm that is given whole take mixed batches: PEFT does so for linear layers only."""
    forward = wrapper.forward

    def mixed(states: torch.Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return forward(states, *args, **kwargs)
        made = None
        for name in dict.fromkeys(adapter_names):
            rows = [row for row, each in enumerate(adapter_names) if each == name]
            known = name in wrapper.modules_to_save
            norm = wrapper.modules_to_save[name] if known else wrapper.original_module
            part = norm(states[rows], *args, **kwargs)
            made = part.new_empty(len(states), *part.shape[1:]) if made is None else made
            made[rows] = part
        return made

    wrapper.forward = mixed
