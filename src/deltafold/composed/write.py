"""A composed model on disk, tensor by tensor: what the base has, without what is shared, plus factors.

Two ways to write the same model: shared, with `modeling_deltafold.py` beside the weights, or dense,
the ordinary model that its layers amount to. What is not composed is copied bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.building import build
from deltafold.calibration.models import quiet
from deltafold.calibration.opens import check_opens
from deltafold.calibration.wiring import wire
from deltafold.checkpoint import DTYPES, Checkpoint, CheckpointWriter, plan_shards
from deltafold.checkpoint.beside import write_beside
from deltafold.checkpoint.json_files import CONFIG_FILE
from deltafold.checkpoint.writer import TensorSpec, guard_storage, put_file
from deltafold.coding.sums import all_finite
from deltafold.composed.form import OWN, Form, Linear
from deltafold.composed.modeling import composed_class
from deltafold.composed.standalone import MODULE, modelling_file, shared_config
from deltafold.dtypes import stored_bytes as bytes_of
from deltafold.errors import MismatchError, NonFiniteError, UsageError
from deltafold.running.common import SHARD_BYTES
from deltafold.running.engine import Resources, Task

Tensors = Callable[[str], torch.Tensor]
"""A composed layer's tensor by its name in the form -> its values, in any floating dtype."""


@dataclass(frozen=True)
class Source:
    """A base checkpoint, the class of its model, and the tensor that each parameter is stored in.

    `stored` leaves out parameters that are made of several tensors. Of those, `stacks` has stacked
    experts: their tensors by expert, then by rows. `renamed` are tensors that the composed model's own
    class knows by their parameter's name only: what transformers renames for a class by its name, it
    does not rename for another class.
    """

    checkpoint: Checkpoint
    kind: type
    stored: dict[str, str]
    stacks: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """Raises CheckpointError, MismatchError for what transformers cannot build."""
        model = build(checkpoint.path, causal=False)
        groups = wire(model, checkpoint.own_tensors)
        stored = {name: group.names[0] for name, group in groups.items() if group.converter is None}
        stacks = {
            name: tuple(zip(*group.sources.values(), strict=True))
            for name, group in groups.items()
            if group.converter is not None and group.is_experts
        }
        return cls(checkpoint, type(model), stored, stacks, _renamed(model, stored))

    def tensor_of(self, parameter: str) -> str:
        """The checkpoint tensor of a parameter. Raises MismatchError."""
        if parameter not in self.stored:
            raise MismatchError(
                f"{parameter} of {self.checkpoint.label} is not stored as one tensor, so its layer "
                "cannot be composed."
            )
        return self.stored[parameter]

    def dtype_of(self, module: str) -> str:
        """Dtype, as in headers, of a layer's weight: its factors are stored in the same."""
        return self.checkpoint.tensors[self.tensor_of(f"{module}.weight")].dtype


def _renamed(model: Any, stored: dict[str, str]) -> dict[str, str]:
    """Of the tensors that are called otherwise than their parameters those not found by a composed class."""
    others = {tensor: name for name, tensor in stored.items() if tensor != name}
    if not others:
        return {}
    config = deepcopy(model.config)
    config.deltafold = Form().to_json()
    with torch.device("meta"), quiet():
        known = wire(composed_class(type(model))._from_config(config), others)
    found = {name for group in known.values() for name in group.names}
    return {tensor: name for tensor, name in others.items() if tensor not in found}


@dataclass(frozen=True)
class _Write:
    """One tensor of the output: `make` gives its values, None copies `name` of the checkpoint."""

    spec: TensorSpec
    make: Callable[[], torch.Tensor] | None = None


def shared_specs(source: Source, form: Form) -> list[TensorSpec]:
    """(name, dtype, shape) of every tensor of the shared model, in the order of the file."""
    return [each.spec for each in _shared(source, form, _nothing, {})]


def stored_bytes(specs: list[TensorSpec]) -> int:
    """Bytes of these tensors, headers not counted."""
    return sum(bytes_of(dtype, shape) for _, dtype, shape in specs)


def write_shared(
    source: Source,
    form: Form,
    tensors: Tensors,
    folder: Path,
    *,
    changed: Mapping[str, torch.Tensor] | None = None,
    dense: bool = False,
    shard_bytes: int = SHARD_BYTES,
    resources: Resources | None = None,
) -> dict[str, Any]:
    """Write a composed model into `folder`, or with `dense` the ordinary model it amounts to.

    `tensors` gives what composed layers own: factors, and own weights and biases that are not the
    checkpoint's (see `Form.owned`). `changed` are other parameters that are not the checkpoint's
    either. Values have their shapes in the file, and are rounded once, to the stored dtype. Returns
    the record's row of how it opens. Raises NonFiniteError, StorageError, CheckpointError where it does
    not open.
    """
    guard_storage(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    replaced = {source.tensor_of(name): value for name, value in (changed or {}).items()}
    writes = (_dense if dense else _shared)(source, form, tensors, replaced)
    checkpoint = source.checkpoint
    writer = CheckpointWriter(
        folder,
        plan_shards([each.spec for each in writes], shard_bytes, checkpoint.inner_files),
        checkpoint.metadata or {"format": "pt"},
    )

    resources = resources or Resources()

    def write(each: _Write) -> int:
        name, dtype, shape = each.spec
        tensor = checkpoint.tensor(name) if each.make is None else each.make()
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} of {checkpoint.label}, composed, holds NaN or infinity.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and its entry says {shape}")
        writer.write(name, tensor.to(DTYPES[dtype]).contiguous())
        return tensor.numel() * DTYPES[dtype].itemsize

    tasks = [
        Task(
            each.spec[0],
            partial(write, each),
            memory_bytes=16 * math.prod(each.spec[2]),
            work=float(math.prod(each.spec[2])),
        )
        for each in writes
    ]
    try:
        resources.run("write", tasks)
        writer.finish()
    finally:
        writer.close()
    _side_files(source, form, folder, dense)
    kind = None if dense else composed_class(source.kind)
    return check_opens(folder, checkpoint.label, checkpoint.path, kind)


def _side_files(source: Source, form: Form, folder: Path, dense: bool) -> None:
    changed = {}
    if not dense:
        config = shared_config(source.checkpoint.config(), form, source.kind)
        changed[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    write_beside(source.checkpoint, folder, changed)
    if not dense:
        put_file(folder, f"{MODULE}.py", modelling_file(source.kind).encode())


def _nothing(name: str) -> torch.Tensor:
    raise KeyError(name)


def _shared(
    source: Source, form: Form, tensors: Tensors, replaced: Mapping[str, torch.Tensor]
) -> list[_Write]:
    """The base's tensors but those that layers do not own any more, then what they own anew."""
    gone, new = set(), []
    for path, linear in form.linears.items():
        dtype = source.dtype_of(path)
        owned = dict(linear.tensors(path))
        for leaf in ("weight", "bias"):
            stored = source.stored.get(f"{path}.{leaf}")
            if stored is not None and f"{path}.{leaf}" not in owned:
                gone.add(stored)
            elif stored is not None:
                owned.pop(f"{path}.{leaf}")  # as the checkpoint has it, under its name there
        new += [
            _Write((name, dtype, shape), partial(tensors, name)) for name, shape in owned.items()
        ]
    for path, entry in form.experts.items():
        names = [name for expert in source.stacks[path] for name in expert]
        gone |= set(names)
        dtype = source.checkpoint.tensors[names[0]].dtype
        new += [
            _Write((name, dtype, shape), partial(tensors, name))
            for name, shape in entry.tensors(path)
        ]
    copies = _copies(source, gone, replaced)
    return [*(_called(source, each) for each in copies), *new]


def _called(source: Source, each: _Write) -> _Write:
    """The same tensor under the name that the composed model's class has for it."""
    name, dtype, shape = each.spec
    if name not in source.renamed:
        return each
    make = each.make or partial(source.checkpoint.tensor, name)
    return _Write((source.renamed[name], dtype, shape), make)


def _dense(
    source: Source, form: Form, tensors: Tensors, replaced: Mapping[str, torch.Tensor]
) -> list[_Write]:
    """The base's tensors, the weights of composed layers multiplied out."""
    weights = {}
    for path, linear in form.linears.items():
        if linear.bias != (f"{path}.bias" in source.stored):
            raise UsageError(
                f"{path} has gained or lost a bias, which the ordinary model cannot hold; leave out "
                "--dense."
            )
        weights[source.tensor_of(f"{path}.weight")] = (path, linear)
    experts = {
        name: (path, expert, part)
        for path in form.experts
        for expert, names in enumerate(source.stacks[path])
        for part, name in enumerate(names)
    }
    made = []
    for each in _copies(source, set(), replaced):
        name = each.spec[0]
        if name in experts:
            rows = each.spec[2][0]
            made.append(_Write(each.spec, partial(_expert, form, tensors, experts[name], rows)))
        elif name in weights:
            make = partial(dense_weight, source, form, tensors, *weights[name], replaced)
            made.append(_Write(each.spec, make))
        else:
            made.append(each)
    return made


def _expert(form: Form, tensors: Tensors, place: tuple[str, int, int], rows: int) -> torch.Tensor:
    """Some rows of one expert in fp32; `place` is (parameter, expert, which part of its rows)."""
    path, expert, part = place
    chosen = slice(part * rows, (part + 1) * rows)
    b, a = tensors(f"{path}_delta.b")[expert, chosen], tensors(f"{path}_delta.a")[expert]
    made = b.float() @ a.float()
    if form.experts[path].mean:
        made += tensors(f"{path}_delta.mean")[chosen].float()
    return made


def _copies(source: Source, gone: set[str], replaced: Mapping[str, torch.Tensor]) -> list[_Write]:
    return [
        _Write(
            (name, info.dtype, tuple(info.shape)),
            partial(replaced.__getitem__, name) if name in replaced else None,
        )
        for name, info in source.checkpoint.tensors.items()
        if name not in gone
    ]


def dense_weight(
    source: Source,
    form: Form,
    tensors: Tensors,
    path: str,
    linear: Linear,
    replaced: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """W (out, in) of a composed layer in fp32, in the layout that the checkpoint has."""
    total = torch.zeros(linear.shape)
    if linear.weight is not None:
        owner = path if linear.weight == OWN else linear.weight
        name = source.tensor_of(f"{owner}.weight")
        held = replaced.get(name)
        held = (source.checkpoint.tensor(name) if held is None else held).float()
        total += held.T if linear.transposed else held
    if linear.scale:
        total *= tensors(f"{path}.scale").float()[:, None]
    start = 0
    for number, part in enumerate(linear.parts):
        own = f"{path}.delta.{number}"
        a = tensors(f"{_owner(form, own, part.a, 'a')}.a").float()
        b = tensors(f"{_owner(form, own, part.b, 'b')}.b").float()
        total[start : start + part.rows].addmm_(b, a)
        start += part.rows
    return total.T.contiguous() if linear.transposed else total


def _owner(form: Form, own: str, lender: str | None, factor: str) -> str:
    """Who owns a factor: a lender may itself have borrowed it."""
    while lender is not None:
        own = lender
        path, _, number = own.rpartition(".delta.")
        lender = getattr(form.linears[path].parts[int(number)], factor)
    return own
