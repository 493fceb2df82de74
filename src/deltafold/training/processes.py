"""One run in one process or in several: who writes, and how gradients are summed.

`accelerate launch -m deltafold ...` or `torchrun -m deltafold ...` start the processes; only what the
environment tells them is used. Each holds a whole model, and a part of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from deltafold.running.devices import here, place

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Joins the other processes, if there are any."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        import torch.distributed as distributed

        if not distributed.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("nccl" if cuda else "gloo")
        return cls(distributed.get_rank(), world)

    @property
    def is_main(self) -> bool:
        """True for the process that writes and reports."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The processor that this process trains on: the one asked for, else a GPU if there is one."""
        if self.world == 1 and place().asked:
            return here()
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each gradient becomes the sum over all processes, which must have the same ones."""
        if self.world == 1:
            return
        import torch.distributed as distributed

        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor, of any shape, over all processes."""
        if self.world > 1:
            import torch.distributed as distributed

            distributed.all_reduce(values)
        return values

    def shared(self, thing: Thing) -> Thing:
        """What the main process has, for all."""
        if self.world == 1:
            return thing
        import torch.distributed as distributed

        box: list[Any] = [thing]
        distributed.broadcast_object_list(box, src=0)
        thing = box[0]
        return thing

    def end(self) -> None:
        """Leave the others."""
        if self.world > 1:
            import torch.distributed as distributed

            if distributed.is_initialized():
                distributed.barrier()
                distributed.destroy_process_group()
