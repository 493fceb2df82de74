"""A LoRA adapter given as the fine-tune: the model that it makes of its base, written out.

    W' = W + scale B A        scale = alpha / r, or alpha / sqrt(r) where the adapter says so

The product is formed in fp32, added in fp32 and rounded to the base's dtype once, as PEFT's
`merge_and_unload` does. The merged model lies in deltafold's cache while the run lasts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.checkpoint import Checkpoint, CheckpointWriter, cache_root, open_checkpoint
from deltafold.checkpoint.beside import write_beside
from deltafold.checkpoint.hub import local_folder
from deltafold.checkpoint.json_files import read_object
from deltafold.checkpoint.kinds import ADAPTER_CONFIG, ADAPTER_FILE, adapter_folder
from deltafold.checkpoint.writer import TensorSpec, guard_storage
from deltafold.compressing.methods.renaming import find_renaming
from deltafold.errors import CheckpointError, MismatchError
from deltafold.lazy import torch
from deltafold.running.locks import held, sweep

_OUTER = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight|\.default\.weight|\.default)?$")


@contextlib.contextmanager
def whole_model(base: str | Path, finetuned: str | Path) -> Iterator[str | Path]:
    """`finetuned`, or the folder of the model that it makes of `base` if it is an adapter.

    Raises CheckpointError or MismatchError for an adapter that cannot be merged.
    """
    path = Path(finetuned).expanduser()
    folder = adapter_folder(path if path.exists() else local_folder(finetuned))
    if folder is None:
        yield finetuned
        return
    adapter = Checkpoint(folder / ADAPTER_FILE)
    with open_checkpoint(base) as ground, adapter:
        config = _read_config(folder)
        key = hashlib.sha256(json.dumps([config, ground.fingerprint()]).encode())
        key.update(adapter.fingerprint().encode())
        # Made anew each time, in a place of its own: another run may be busy with the same adapter.
        place = f"{key.hexdigest()[:24]}-{secrets.token_hex(4)}"
        root = cache_root() / "merged"
        sweep(root)
        with held(root / place) as mine:
            made = mine / folder.absolute().name
            _write(made, ground, adapter, folder, config)
            yield made


def _read_config(folder: Path) -> dict[str, Any]:
    """PEFT's config, if what it asks for is plain LoRA. Raises CheckpointError."""
    config = read_object(folder / ADAPTER_CONFIG) or {}
    odd = [
        key
        for key in (
            "use_dora",
            "trainable_token_indices",
            "target_parameters",
            "alora_invocation_tokens",
        )
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or odd:
        kind = odd[0] if odd else f"type {config.get('peft_type')}"
        raise _cannot(folder, f"it is of a kind that is not merged here ({kind})")
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{folder} has no {ADAPTER_FILE}; save the adapter as safetensors.")
    return config


def _cannot(folder: Path, why: str) -> MismatchError:
    return MismatchError(
        f"The adapter {folder} cannot be merged into the base: {why}; merge it with PEFT "
        "(merge_and_unload), and give that folder."
    )


@dataclass(frozen=True)
class _Pair:
    """Factors of one module, by their names in the adapter."""

    left: str
    right: str
    embedding: bool
    scale: float


def _write(
    made: Path, base: Checkpoint, adapter: Checkpoint, folder: Path, config: dict[str, Any]
) -> None:
    """The merged model, laid out as the base, under `made`."""
    pairs, given = _matched(base, adapter, folder, config)
    layout: dict[str, list[TensorSpec]] = {base.relative(shard): [] for shard in base.shards}
    for name, info in base.tensors.items():
        told = adapter.tensors[given[name]] if name in given else info
        layout[base.relative(info.file)].append((name, told.dtype, told.shape))
    last = [file for file in layout if "/" not in file][-1]
    for name, source in given.items():
        if name not in base.tensors:
            told = adapter.tensors[source]
            layout[last].append((name, told.dtype, told.shape))
    guard_storage(made, lambda: made.mkdir(parents=True))
    writer = CheckpointWriter(made, layout, base.metadata or {"format": "pt"})
    try:
        for name in (spec[0] for specs in layout.values() for spec in specs):
            value = adapter.tensor(given[name]) if name in given else base.tensor(name)
            if name in pairs:
                change = _product(adapter, pairs[name], bool(config.get("fan_in_fan_out")))
                if change.shape != value.shape:
                    raise _cannot(folder, f"its product for {name} has another shape")
                value = (value.float() + change).to(value.dtype)
            writer.write(name, value)
        writer.finish()
    finally:
        writer.close()
    write_beside(base, made, {})
    with Checkpoint(folder) as own:  # what the adapter has of its own goes before
        write_beside(own, made, {})
    # Unfinished work knows its inputs by their times: those of the adapter, whenever it is merged.
    when = (folder / ADAPTER_FILE).stat().st_mtime_ns
    for file in made.rglob("*"):
        os.utime(file, ns=(when, when))


def _matched(
    base: Checkpoint, adapter: Checkpoint, folder: Path, config: dict[str, Any]
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """Pairs of factors by the base's name of what they change, and tensors given whole."""
    factors: dict[str, dict[str, str]] = {}
    given: dict[str, str] = {}
    for name in adapter.tensors:
        plain = name.removeprefix(_OUTER)
        if found := _FACTOR.match(plain):
            factors.setdefault(f"{found[1]}.weight", {})[found[3] + (found[2] or "")] = name
        elif "lora_" in plain:
            raise _cannot(folder, f"it holds {name}")
        else:
            given[plain.replace(".modules_to_save.default", "").replace(".base_layer", "")] = name
    shapes = {name: _target_shape(adapter, each, folder) for name, each in factors.items()}
    shapes |= {name: adapter.tensors[source].shape for name, source in given.items()}
    if config.get("fan_in_fan_out"):
        shapes |= {n: shapes[n][::-1] for n, each in factors.items() if "A" in each}
    renamed = find_renaming({n: i.shape for n, i in base.tensors.items()}, shapes).found
    if lost := [n for n in factors if n not in base.tensors and n not in renamed]:
        raise _cannot(folder, f"{base.label} has no tensor {lost[0]}")
    pairs = {
        renamed.get(name, name): _pair(adapter, name, each, config)
        for name, each in factors.items()
    }
    quantised = [n for n in pairs if base.tensors[n].dtype not in ("F64", "F32", "BF16", "F16")]
    if quantised:
        raise _cannot(folder, f"the base's {quantised[0]} is {base.tensors[quantised[0]].dtype}")
    return pairs, {renamed.get(name, name): source for name, source in given.items()}


def _target_shape(adapter: Checkpoint, names: dict[str, str], folder: Path) -> tuple[int, ...]:
    embedding = "Aembedding_" in names
    ends = ("Aembedding_", "Bembedding_") if embedding else ("A", "B")
    if set(names) != set(ends):
        raise _cannot(folder, f"it lacks the partner of {next(iter(names.values()))}")
    a, b = (adapter.tensors[names[end]].shape for end in ends)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise _cannot(folder, f"{names[ends[0]]} is no factor of a matrix")
    return (a[1], b[0]) if embedding else (b[0], a[1])


def _pair(adapter: Checkpoint, name: str, names: dict[str, str], config: dict[str, Any]) -> _Pair:
    embedding = "Aembedding_" in names
    right = names["Aembedding_" if embedding else "A"]
    rank, module = adapter.tensors[right].shape[0], name.removesuffix(".weight")
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Pair(names["Bembedding_" if embedding else "B"], right, embedding, float(scale))


def _product(adapter: Checkpoint, pair: _Pair, transposed: bool) -> torch.Tensor:
    """scale B A, fp32, in the base's orientation."""
    product = adapter.tensor(pair.left).float() @ adapter.tensor(pair.right).float()
    return (product.T if pair.embedding or transposed else product) * pair.scale
