"""How a model calls its blocks, found by running its own forward with blocks that only take notes.

Masks and positions are made by the model from ids, and differ between models and between blocks.
So the real forward runs, every block standing aside: it notes its arguments and hands its hidden
states on as they are. The same trick enters the forward behind the blocks: the first block hands on
the last hidden states, and out come logits, normed, scaled and capped as the model does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from deltafold.calibration.building import decoder_of
from deltafold.calibration.models import quiet
from deltafold.calibration.skeleton import Skeleton
from deltafold.calibration.wiring import Weights
from deltafold.errors import MismatchError
from deltafold.foreign import blamed, first_line


@dataclass(frozen=True)
class Call:
    """How one block is called beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the name under which hidden states go, None if they come first

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's new hidden states (b, t, width)."""
        if self.keyword is None:
            output = block(hidden, *self.args, **self.kwargs)
        else:
            output = block(*self.args, **{self.keyword: hidden}, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @property
    def carries_gradients(self) -> bool:
        """True if something beside the hidden states was computed from parameters under training."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return any(isinstance(each, torch.Tensor) and each.requires_grad for each in leaves)


class Forward:
    """A skeleton's forward, entered before or behind its blocks.

    The modules that run must be filled. What fails inside the model's own code is raised as
    MismatchError; `label` names the model in it.
    """

    def __init__(self, skeleton: Skeleton, label: str):
        self.skeleton, self.label = skeleton, label
        self.width = 0  # of hidden states; known once the forward has run
        self._by_ids: bool | None = None  # must the forward be given ids? found by trying
        self._as_tuple: bool | None = None  # do blocks answer (hidden states,)? found by trying

    def note(
        self, ids: torch.Tensor, disturb: float = 0.0, use_cache: bool = False
    ) -> tuple[torch.Tensor, list[Call]]:
        """(hidden states (b, t, width) before the first block, how each block is called)."""
        noted: list[Call] = []
        entering: list[torch.Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            keyword = None if args else _hidden_keyword(kwargs)
            hidden = args[0] if keyword is None else kwargs.pop(keyword)
            noted.append(Call(args[1:], kwargs, keyword))
            entering.append(hidden)
            return self._answer(hidden + disturb if disturb else hidden)

        with self._stubs(stub), self.sentence(), quiet():
            decoder = decoder_of(self.skeleton.model)
            decoder(input_ids=ids.to(self.skeleton.device), use_cache=use_cache)
        shapes = {each.shape for each in entering}
        n_blocks = len(self.skeleton.blocks)
        if len(noted) != n_blocks or len(shapes) != 1 or entering[0].dim() != 3:
            raise self._unfit(f"{len(noted)} calls of its {n_blocks} blocks were seen")
        self.width = entering[0].shape[-1]
        return entering[0], noted

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) of last hidden states (n, width), before the last norm."""
        entering = [rows[:, None]]  # each row is a text of one token

        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs[_hidden_keyword(kwargs)]
            return self._answer(entering.pop() if entering else hidden)

        with self._stubs(stub), self.sentence(), quiet():
            made = self.skeleton.model(**self._any_input(len(rows)), use_cache=False)
            return made.logits[:, 0]

    def _any_input(self, n: int) -> dict[str, torch.Tensor]:
        """An input of n texts of one token; what it holds does not matter."""
        device, dtype = self.skeleton.device, self.skeleton.dtype
        if self._by_ids:
            return {"input_ids": torch.zeros(n, 1, dtype=torch.long, device=device)}
        width = self.skeleton.model.get_input_embeddings().weight.shape[1]
        return {"inputs_embeds": torch.zeros(n, 1, width, dtype=dtype, device=device)}

    @torch.no_grad()
    def head_names(self, weights: Weights) -> list[str]:
        """Parameters that `logits` needs; the input embedding only if the forward insists on ids."""
        skeleton = self.skeleton
        if self._by_ids is None:
            self._by_ids = not skeleton.takes_embeddings()
            if not self._by_ids:
                with skeleton.filled(skeleton.head(by_ids=False), weights):
                    try:
                        self.logits(torch.zeros(1, self.width).to(skeleton.device, skeleton.dtype))
                    except MismatchError:
                        self._by_ids = True
        return skeleton.head(self._by_ids)

    def probe(self) -> None:
        """Find out, once, how blocks answer; refuse a model whose blocks hand on something else."""
        if self._as_tuple is not None:
            return
        ids = torch.zeros(2, 3, dtype=torch.long)
        self._as_tuple = False
        try:
            _, calls = self.note(ids)
        except MismatchError:
            self._as_tuple = True
            _, calls = self.note(ids)
        _, others = self.note(ids, disturb=0.5)
        for one, other in zip(calls, others, strict=True):
            if not _same((one.args, one.kwargs), (other.args, other.kwargs)):
                raise self._unfit("what one block makes reaches another beside the hidden states")

    def _answer(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._as_tuple else hidden

    @contextlib.contextmanager
    def _stubs(self, stub: Callable[..., Any]) -> Iterator[None]:
        """Every block answers by `stub` instead of its own forward."""
        blocks: list[Any] = self.skeleton.blocks
        for block in blocks:
            block.forward = stub
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @contextlib.contextmanager
    def sentence(self) -> Iterator[None]:
        """What fails inside the model's own code becomes one sentence."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise blamed(error, self._unfit(first_line(error))) from error

    def _unfit(self, why: str) -> MismatchError:
        kind = type(self.skeleton.model).__name__
        return MismatchError(
            f"{self.label}, a {kind}, cannot be run block by block ({why}); compress takes it "
            "with --calibration none."
        )


def _hidden_keyword(kwargs: dict[str, Any]) -> str:
    """The name under which a block is given its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(name for name, each in kwargs.items() if isinstance(each, torch.Tensor))


def _same(one: Any, other: Any) -> bool:
    """True if two nests of arguments hold equal tensors."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(
        not isinstance(a, torch.Tensor) or (a.shape == b.shape and torch.equal(a, b))
        for a, b in pairs
    )


class Interned:
    """Equal tensors of different calls, kept once: most batches have masks and positions alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def __call__(self, call: Call) -> Call:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._one, (call.args, call.kwargs))
        return Call(args, kwargs, call.keyword)

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self._known.setdefault((tuple(tensor.shape), tensor.dtype), [])
        for each in known:
            if each is tensor or torch.equal(each, tensor):
                return each
        known.append(tensor)
        return tensor
