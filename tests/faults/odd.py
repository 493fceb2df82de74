"""Checkpoints that are odd, by mistake or on purpose."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TEXTS: tuple[bytes, ...] = (
    b"null", b"[]", b"3", b'"x"', b"true", b"NaN", b"", b"\0", b"\xff\xfe{}", b"{}", b"{", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"model_type": "llama"}', b'{"model_type": null}', b'{"model_type": []}',
    b'{"vocab_size": 1e999}',
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1 << 40, 1 << 70, 0.5, 1e308, float("nan"), "", "x", "\ud800", [], [1], {}, {"a": 1},
)  # fmt: skip
NEW_NAMES = (
    "x", "", "a/b", "model.layers.9.mlp.up_proj.weight", "caf\u00e9", "[red]", "a\nb", "x" * 900,
)  # fmt: skip
NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
DTYPES = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32, torch.float64, torch.int8,
    torch.int64, torch.bool, torch.uint8, torch.complex64,
)  # fmt: skip


def make_odd(folder: Path, rng: random.Random) -> str:
    """One thing of a checkpoint made odd; says what."""
    return rng.choice((_text, _field, _field, _tensor, _tensor, _tensor, _file))(folder, rng)


def _text(folder: Path, rng: random.Random) -> str:
    name, text = rng.choice(NAMES), rng.choice(TEXTS)
    (folder / name).write_bytes(text)
    return f"{name} is {text[:24]!r}"


def _field(folder: Path, rng: random.Random) -> str:
    name = rng.choice(NAMES[:1] * 3 + NAMES)
    found = json.loads((folder / name).read_text())
    key, value = rng.choice(sorted(found)), rng.choice(VALUES)
    if rng.random() < 0.2:
        del found[key]
        value = "gone"
    else:
        found[key] = value
    (folder / name).write_text(json.dumps(found))
    return f"{key} of {name} is {str(value)[:40]!r}"


def _tensor(folder: Path, rng: random.Random) -> str:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    way = rng.choice(sorted(WAYS))
    said = WAYS[way](tensors, name, rng)
    save_file(
        {key: each.contiguous() for key, each in tensors.items()}, file, metadata={"format": "pt"}
    )
    return f"{name}: {said or way}"


Tensors = dict[str, torch.Tensor]


def _dtype(tensors: Tensors, name: str, rng: random.Random) -> str:
    dtype = rng.choice(DTYPES)
    tensors[name] = tensors[name].to(dtype)
    return f"dtype {dtype}"


def _all_dtype(tensors: Tensors, name: str, rng: random.Random) -> str:
    dtype = rng.choice(DTYPES)
    for each in tensors:
        tensors[each] = tensors[each].to(dtype)
    return f"all of dtype {dtype}"


def _value(tensors: Tensors, name: str, rng: random.Random) -> str:
    value = rng.choice((3e38, -3e38, 1e38, float("inf"), float("nan"), 1e-40, 0.0))
    whole = tensors[name].clone()
    if rng.random() < 0.5:
        whole.fill_(value)
    else:
        whole.view(-1)[rng.randrange(whole.numel())] = value
    tensors[name] = whole
    return f"holds {value}"


def _large(tensors: Tensors, name: str, rng: random.Random) -> str:
    for each in tensors:
        tensors[each] = (tensors[each].float() * 1e37).to(tensors[each].dtype)
    return "all near the largest number"


def _shape(tensors: Tensors, name: str, rng: random.Random) -> str:
    whole = tensors[name]
    tensors[name] = rng.choice(
        (
            whole.reshape(-1),
            whole[:0],
            whole[:1],
            whole.reshape(1, *whole.shape),
            whole.flatten()[0],
            whole[:-1],
        )
    )
    return f"shape {list(tensors[name].shape)}"


def _gone(tensors: Tensors, name: str, rng: random.Random) -> str:
    del tensors[name]
    return "gone"


def _more(tensors: Tensors, name: str, rng: random.Random) -> str:
    other = rng.choice(
        (
            "x",
            "",
            "a/b",
            "model.layers.9.mlp.up_proj.weight",
            "caf\u00e9",
            "[red]",
            "a\nb",
            "x" * 900,
        )
    )
    tensors[other] = tensors[name].clone()
    return f"{other[:20]!r} beside it"


def _renamed(tensors: Tensors, name: str, rng: random.Random) -> str:
    other = rng.choice(("x." + name, name.replace("model.", ""), name.upper()))
    tensors[other] = tensors.pop(name)
    return f"called {other}"


WAYS: dict[str, Callable[[Tensors, str, random.Random], str]] = {
    "dtype": _dtype, "all dtypes": _all_dtype, "value": _value, "large": _large, "shape": _shape,
    "gone": _gone, "more": _more, "renamed": _renamed,
}  # fmt: skip


def _file(folder: Path, rng: random.Random) -> str:
    name = rng.choice((*NAMES, "model.safetensors", "extra.json"))
    path = folder / name
    way = rng.choice(
        ("folder", "loop", "dangling", "pipe", "socket name", "not UTF-8", "deep", "hidden folder")
    )
    if way in ("folder", "loop", "dangling", "pipe"):
        path.unlink(missing_ok=True)
    if way == "folder":
        path.mkdir()
    elif way == "loop":
        path.symlink_to(path)
    elif way == "dangling":
        path.symlink_to(folder / "nowhere")
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "deep":
        deep = folder.joinpath(*["d"] * 9)
        deep.mkdir(parents=True)
        (deep / "x.json").write_text("{}")
    elif way == "not UTF-8":
        (folder / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    elif way == "hidden folder":
        (folder / ".git").mkdir()
        (folder / ".git" / "x").write_text("x")
    else:
        (folder / "a:b.json").write_text("{}")
    return f"{name}: {way}"
