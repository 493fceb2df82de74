"""What a linear layer is to its block, told from the name of its module."""

from __future__ import annotations

from dataclasses import dataclass

from deltafold.names import role_of

_ROLES = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "qkv": ("qkv_proj", "c_attn", "query_key_value", "Wqkv"),
    "o": ("o_proj", "out_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
}
_ROLE_OF = {leaf: role for role, leaves in _ROLES.items() for leaf in leaves}


def matrix_role(module: str) -> str:
    """Role of a layer in its block: q, k, v, qkv, o, gate, up, gate_up, down, router or other.

    >>> matrix_role("model.layers.0.self_attn.q_proj"), matrix_role("transformer.h.3.mlp.c_proj")
    ('q', 'down')
    """
    leaf = module.rpartition(".")[2]
    if leaf in _ROLE_OF:
        return _ROLE_OF[leaf]
    if leaf in ("c_proj", "dense"):
        return "o" if role_of(f"{module}.weight") == "attention" else "down"
    known = role_of(f"{module}.weight")
    return "router" if known == "router" or leaf.endswith("gate") else "other"


@dataclass(frozen=True)
class Matrix:
    """One layer, or all experts of a block that are stacked in one parameter.

    `tensors` are the checkpoint's, by expert and then by rows; a layer has one. `shape` (out, in) is
    that of a layer, or of one expert. `bias` is the checkpoint tensor of its bias.
    """

    module: str
    tensors: tuple[tuple[str, ...], ...]
    block: int
    role: str
    shape: tuple[int, int]
    transposed: bool = False
    bias: str | None = None
    stacked: bool = False

    @property
    def local(self) -> str:
        """What it is called in every block."""
        return ".".join(part for part in self.module.split(".") if not part.isdigit())
