"""Blocks that are told apart by their number: what is left of them is what it was, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deltafold import fold
from deltafold.errors import MismatchError

pytestmark = pytest.mark.integration

DEPTH, KEPT = 8, [0, 2, 3, 6, 7]
NAMES = {
    "vocab_size": 160, "hidden_size": 64, "d_model": 64, "n_embd": 64, "intermediate_size": 96,
    "ffn_dim": 96, "num_hidden_layers": DEPTH, "n_layer": DEPTH, "n_layers": DEPTH,
    "num_layers": DEPTH, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "sliding_window": 16,
    "shared_expert_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "state_size": 16,
    "rotary_dim": 8, "attention_chunk_size": 16, "interleave_moe_layer_step": 1,
    "attention_window": 16, "num_blocks": DEPTH,
}  # fmt: skip
"""Sizes under every name that configs have for them; each config takes those that it knows."""
DERIVED = ("layer_types", "no_rope_layers", "moe_layers", "full_attn_idxs", "layers_block_type")
"""Lists that configs were written without before transformers stored them."""
IDS = torch.arange(3, 67)[None]
KINDS = [
    "apertus", "arcee", "aria_text", "bert", "bert-generation", "biogpt", "bitnet", "bloom",
    "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "cwm", "data2vec-text",
    "deepseek_v2", "doge", "electra", "ernie", "ernie4_5", "exaone4", "falcon", "falcon_h1",
    "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt-sw3",
    "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "lfm2", "llama",
    "llama4_text", "mamba", "megatron-bert", "mellum", "minicpm3", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "moshi", "mpt",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "vaultgemma", "xglm", "xlm-roberta", "xlm-roberta-xl",
]  # fmt: skip
QUICK = [
    "gemma2", "gemma3_text", "cohere2", "olmo3", "exaone4", "smollm3", "llama4_text", "lfm2",
    "gpt_oss", "qwen2_moe", "minicpm3", "mpt", "mamba",
]  # fmt: skip


def build(kind: str, **more: Any) -> Any:
    """A tiny model of this kind, its blocks strong enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        plain = AutoConfig.for_model(kind)
    except (KeyError, ValueError):
        pytest.skip(f"this transformers has no {kind}")
    other = getattr(type(plain), "attribute_map", {})
    sizes = {n: v for n, v in NAMES.items() if n in plain.to_dict() and other.get(n) not in NAMES}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "emb" not in name:
                parameter.mul_(3)
    return model


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def blocks_of(model: Any, depth: int) -> torch.nn.ModuleList:
    return next(
        module for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    )  # fmt: skip


def logits_of_kept(model: Any) -> torch.Tensor:
    """What the whole model computes where the blocks that go hand on what they are given."""

    def aside(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if as_tuple else hidden

    blocks = blocks_of(model, DEPTH)
    found: list[Any] = []
    hook = blocks[1].register_forward_hook(lambda *given: found.append(given[2]))
    model(IDS, use_cache=False)
    hook.remove()
    as_tuple = isinstance(found[0], tuple)
    for number, block in enumerate(blocks):
        if number not in KEPT:
            block.forward = aside
    made: torch.Tensor = model(IDS, use_cache=False).logits
    return made


def folded(folder: Path, out: Path) -> dict[str, Any]:
    return fold(folder, out, "random", blocks=DEPTH - len(KEPT), protect=KEPT, calibration="none")


def check(model: Any, folder: Path, out: Path) -> dict[str, Any]:
    """Fold the folder: what is left computes what its blocks did."""
    record = folded(folder, out)
    assert record["kept"] == KEPT
    with torch.no_grad():
        wanted, got = logits_of_kept(model), opened(out)(IDS).logits
    assert torch.allclose(got, wanted, atol=1e-3 * float(wanted.abs().max()))
    return record


def each_kind() -> list[Any]:
    """All kinds; those without a rule of their own only where slow tests are run."""
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", each_kind())
def test_kept_blocks_compute_what_they_did(kind: str, tmp_path: Path) -> None:
    """The config as transformers stores it, and as it was before it stored derived lists."""
    model = build(kind)
    model.save_pretrained(tmp_path / "whole")
    assert check(model, tmp_path / "whole", tmp_path / "out")["checked"]["blocks_compared"]
    path = tmp_path / "whole/config.json"
    raw = json.loads(path.read_text())
    if any(raw.get(key) for key in DERIVED):
        path.write_text(json.dumps({k: v for k, v in raw.items() if k not in DERIVED}))
        check(opened(tmp_path / "whole"), tmp_path / "whole", tmp_path / "published")


def test_a_period_of_an_older_config_is_written_out(tmp_path: Path) -> None:
    for kind, period in (("gemma3_text", 3), ("cohere2", 3), ("exaone4", 4)):
        folder = tmp_path / kind
        build(kind, sliding_window=16).save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text())
        old = {
            key: value
            for key, value in raw.items()
            if key not in (*DERIVED, "_sliding_window_pattern")
        }
        (folder / "config.json").write_text(json.dumps(old | {"sliding_window_pattern": period}))
        whole = opened(folder)
        types = whole.config.layer_types
        check(whole, folder, tmp_path / f"{kind}-out")
        made = json.loads((tmp_path / f"{kind}-out/config.json").read_text())
        assert made["layer_types"] == [types[number] for number in KEPT]


def test_pairs_of_pattern_and_count(tmp_path: Path) -> None:
    model = build("gpt_neo", attention_types=[[["global", "local"], 4]], window_size=8)
    model.save_pretrained(tmp_path / "whole")
    raw = json.loads((tmp_path / "whole/config.json").read_text())
    raw.pop("attention_layers", None)
    (tmp_path / "whole/config.json").write_text(json.dumps(raw))
    check(model, tmp_path / "whole", tmp_path / "out")
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made["attention_types"] == [[["global", "global", "local", "global", "local"], 1]]


def test_a_scale_that_follows_from_the_depth_is_brought_back(tmp_path: Path) -> None:
    model = build("minicpm3", scale_depth=1.4)
    model.save_pretrained(tmp_path / "whole")
    check(model, tmp_path / "whole", tmp_path / "out")
    assert opened(tmp_path / "out").config.scale_depth == pytest.approx(1.4 * (5 / 8) ** 0.5)


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"transformer\.h\.2\.attn\.scaling"),
        ("diffllama", {}, r"layers\.2\.self_attn\.lambda_init"),
    ],
)
def test_a_number_that_cannot_be_kept_is_named(
    kind: str, more: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = build(kind, **more)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(MismatchError, match=f"{named} is .* and would be"):
        folded(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    record = fold(
        tmp_path / "whole", tmp_path / "first", "random", blocks=2, protect=[0, 1, 2, 3, 4, 5],
        calibration="none",
    )  # fmt: skip
    assert record["checked"]["run"], "the first blocks keep their numbers"


def test_what_settings_do_not_show_is_seen_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that multiplies by the block's number: no setting differs, the states do."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    build("llama").save_pretrained(tmp_path / "whole")
    plain = LlamaDecoderLayer.forward

    def numbered(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = plain(self, hidden_states, *args, **kwargs)
        return made + self.self_attn.layer_idx

    monkeypatch.setattr(LlamaDecoderLayer, "forward", numbered)
    with pytest.raises(MismatchError, match="depends on a block's number"):
        folded(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out").exists()


PER_LAYER = {
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}


def test_embeddings_with_a_part_for_each_block_lose_those_of_the_blocks_that_go(
    tmp_path: Path,
) -> None:
    model = build("gemma4_text", global_head_dim=16, **PER_LAYER)
    model.save_pretrained(tmp_path / "whole")
    assert check(model, tmp_path / "whole", tmp_path / "out")["checked"]["run"]
    whole, left = (opened(tmp_path / each).model for each in ("whole", "out"))
    table = whole.embed_tokens_per_layer.weight.unflatten(1, (DEPTH, 8))
    assert torch.equal(left.embed_tokens_per_layer.weight, table[:, KEPT].flatten(1))


def test_parts_that_cannot_be_seen_at_work_are_refused(tmp_path: Path) -> None:
    model = build(
        "gemma3n_text", laurel_rank=8, activation_sparsity_pattern=[0.0] * DEPTH, **PER_LAYER
    )
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(MismatchError, match=r"per_layer.* has a part for each block"):
        folded(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out").exists()
