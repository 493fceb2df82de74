"""A model without weights: its modules on the meta device, filled and emptied one at a time.

    | embedding, position embeddings | block 0 | block 1 | ... | norm, head |
      `outside`                        a block at a time         `outside`

Blocks are told by structure: the list of modules inside the decoder that is as long as the config
says the model is deep. Buffers that checkpoints do not hold (the frequencies of rotary embeddings)
are computed for real when the skeleton is built.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltafold.calibration.building import (
    build,
    decoder_of,
    fill_computed_buffers,
    find_blocks,
    stored_buffers,
)
from deltafold.calibration.models import load_weights
from deltafold.calibration.wiring import Group, Weights, wire
from deltafold.errors import CheckpointError, DeltafoldWarning, MismatchError
from deltafold.foreign import blamed


class Skeleton:
    """The modules of a model, and where their weights come from.

    `names` are the checkpoint's tensors. Raises CheckpointError and MismatchError with the reason
    why a folder cannot be run block by block.
    """

    def __init__(self, folder: Path, names: Collection[str], dtype: torch.dtype, device: str):
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.model = build(folder)
        self.blocks, self.block_names = find_blocks(self.model, folder)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._parameters |= stored_buffers(self.model)
        self._parts = self._divide()
        fill_computed_buffers(self.model, self.device)
        self.names = tuple(names)
        self.groups = wire(self.model, names)
        self.is_whole = self._must_be_whole()
        self._whole: tuple[Weights, dict[str, torch.Tensor]] | None = None

    def _divide(self) -> dict[str, int | None]:
        """Number of the block that a parameter belongs to, or None outside of blocks.

        Parameters that text never meets (towers for images or sound) are left out.
        """
        numbers = {
            id(module): number
            for number, block in enumerate(self.blocks)
            for module in block.modules()
        }
        decoder = decoder_of(self.model)
        inside = {id(module) for module in decoder.modules()}
        aside = [
            module for module in self.model.children()
            if not any(each is decoder for each in module.modules())
        ]  # fmt: skip
        inside |= {id(each) for module in aside for each in module.modules()}
        parts: dict[str, int | None] = {}
        for name in self._parameters:
            owner = id(self.model.get_submodule(name.rpartition(".")[0]))
            if owner in numbers or owner in inside:
                parts[name] = numbers.get(owner)
        return parts

    def add_bias(self, path: str) -> None:
        """Give the linear layer `path` a bias, which its weights are then asked for as PATH.bias."""
        module, name = self.model.get_submodule(path), f"{path}.bias"
        empty = torch.empty(module.weight.shape[0], device="meta")
        module.bias = nn.Parameter(empty, requires_grad=False)
        self._parameters[name] = module.bias
        self._parts[name] = self._parts[f"{path}.weight"]
        self.groups[name] = Group((name,), {name: (name,)})

    def block(self, number: int) -> list[str]:
        """Parameters of one block."""
        return [name for name, part in self._parts.items() if part == number]

    def outside(self) -> list[str]:
        """Parameters of the decoder outside of its blocks, which make hidden states of ids."""
        inside = {id(module) for module in decoder_of(self.model).modules()}
        return [
            name for name, part in self._parts.items()
            if part is None and id(self.model.get_submodule(name.rpartition(".")[0])) in inside
        ]  # fmt: skip

    def head(self, by_ids: bool) -> list[str]:
        """Parameters that make logits of hidden states; the embedding too if ids must be given."""
        needless = None if by_ids else self.embedding()
        return [name for name, part in self._parts.items() if part is None and name != needless]

    def embedding(self) -> str | None:
        """The name of the table of input embeddings, where it is an ordinary one."""
        return self._weight_of(self.model.get_input_embeddings())

    def head_weight(self) -> str | None:
        """The name of the matrix that makes logits, where it is an ordinary one."""
        return self._weight_of(self.model.get_output_embeddings())

    def _weight_of(self, module: nn.Module | None) -> str | None:
        found = [name for name, each in self.model.named_modules() if each is module]
        name = f"{found[0]}.weight" if found else ""
        return name if name in self._parameters else None

    def takes_embeddings(self) -> bool:
        """True if `forward` can be given embeddings instead of ids."""
        return "inputs_embeds" in inspect.signature(self.model.forward).parameters

    def pieces(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter, or its gradient, by checkpoint tensor; these have their stored shapes.

        Raises MismatchError.
        """
        if self.is_whole:
            yield name, tensor
            return
        try:
            yield from self.groups[name].split(tensor)
        except ValueError as error:
            raise MismatchError(f"{self.folder}: {error}, so it cannot be trained.") from None

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoint tensors of a parameter; its own name where the model is loaded whole."""
        return (name,) if self.is_whole else self.groups[name].names

    def matrix_names(self, path: str, expert: int) -> tuple[str, ...]:
        """Checkpoint tensors that a matrix of a parameter comes from, by rows, where that is known.

        `expert` numbers the matrices of a parameter with three dimensions.
        """
        group = self.groups[path]
        if self.is_whole:
            return (path,) if path in self.names else ()
        if group.is_experts:
            return tuple(names[expert] for names in group.sources.values())
        return group.names if len(group.names) == 1 else ()

    def _must_be_whole(self) -> bool:
        """True if some parameters can only be put together by loading the model with transformers.

        Raises CheckpointError where no tensors are left that they could be made of.
        """
        missing = [name for name in self._parts if name not in self.groups]
        known = [self.groups[name] for name in self._parameters if name in self.groups]
        used = {name for group in known for name in group.names}
        if missing and not set(self.names) - used:
            raise CheckpointError(
                f"{self.folder} lacks the weight {missing[0]} ({len(missing)} missing in all); "
                "copy or download it again."
            )
        if missing:
            warnings.warn(
                f"{self.folder}: only transformers can put {missing[0]} together, so the whole "
                "model is held in memory instead of a block at a time.",
                DeltafoldWarning,
                stacklevel=2,
            )
        return bool(missing)

    @contextlib.contextmanager
    def filled(
        self, names: Collection[str], weights: Weights, grad: Collection[str] = ()
    ) -> Iterator[dict[str, nn.Parameter]]:
        """The named parameters with their weights, for the length of the `with` block.

        Yields the parameters by name; those in `grad` collect gradients. Raises MismatchError if a
        tensor has not the shape that the model wants.
        """
        try:
            yield self._fill(names, weights, grad)
        finally:
            for name in names:
                self._put(name, self._parameters[name])

    def _fill(
        self, names: Collection[str], weights: Weights, grad: Collection[str]
    ) -> dict[str, nn.Parameter]:
        filled: dict[str, nn.Parameter] = {}
        for name in names:
            if name in filled:
                continue
            for each, tensor in self._made(name, weights).items():
                if each in names:
                    filled[each] = self._put(each, self._checked(each, tensor), each in grad)
        return filled

    def _made(self, name: str, weights: Weights) -> dict[str, torch.Tensor]:
        if self.is_whole:
            return {name: self._load_whole(weights)[name]}
        group = self.groups[name]
        try:
            made = group.make(self.model, weights)
        except RuntimeError as error:  # tensors of shapes that cannot be stacked
            raise blamed(
                error,
                MismatchError(
                    f"{name} cannot be made from {group.names[0]} and the like ({error}); check that "
                    f"weights and config of {self.folder} belong together."
                ),
            ) from error
        # A tied parameter goes by the name of its partner.
        return made if name in made else {name: made[group.targets[0]]}

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self._parameters[name].shape
        if tensor.shape != wanted:
            raise MismatchError(
                f"{name} has shape {list(tensor.shape)}, but the config of {self.folder} asks for "
                f"{list(wanted)}; check that weights and config belong together."
            )
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)

    def _put(self, name: str, tensor: torch.Tensor, grad: bool = False) -> Any:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            return tensor
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=grad)
        module._parameters[leaf] = tensor
        return tensor

    def _load_whole(self, weights: Weights) -> dict[str, torch.Tensor]:
        """The whole model's parameters, kept until other weights are asked for."""
        if self._whole is None or self._whole[0] is not weights:
            self._whole = None
            state = {name: weights(name) for name in self.names}
            label = str(self.folder)
            loaded = load_weights(self.model.config, state, label, dtype=self.dtype)
            self._whole = (weights, loaded.state_dict())
        return self._whole[1]
