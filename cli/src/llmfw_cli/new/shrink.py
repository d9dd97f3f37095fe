"""A configuration of the same kind, small enough to build and run in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIDDEN, HEADS, VOCABULARY, POSITIONS = 64, 4, 128, 128
_NOT_NEEDED = ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_INNER = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
)  # fmt: skip
_LATENT = {  # of latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
}
_DERIVED_WHEN_NONE = ("head_dim", "num_key_value_heads")
_AT_MOST = {  # of a small mixture of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"), 2),
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def shrink(raw: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fields of a small model with the same switches.

    Args:
        raw: The contents of config.json.
        names: Usual field names by the ones this configuration uses (`n_embd` is `hidden_size`).
    """
    usual = dict(names or {})

    def read(name: str) -> Any:
        spelled = [own for own, common in usual.items() if common == name]
        return next((raw[key] for key in (name, *spelled) if raw.get(key) is not None), None)

    hidden, heads = read("hidden_size") or HIDDEN, read("num_attention_heads") or HEADS
    layers = read("num_hidden_layers") or 2
    group = max(1, heads // (read("num_key_value_heads") or heads))
    head_dim = read("head_dim") or hidden // heads
    ours = HIDDEN // HEADS
    varied = any(isinstance(value, list) and len(value) == layers for value in raw.values())
    few = min(layers, 4 if varied else 2)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(1, HEADS // group),
        "num_kv_heads": max(1, HEADS // group),
        "num_hidden_layers": few,
        "head_dim": ours,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "sliding_window": 8,
        "rotary_dim": max(2, ours * (read("rotary_dim") or ours) // head_dim // 2 * 2),
        "query_pre_attn_scalar": ours,
    }
    if "kv_lora_rank" in raw:
        width = "qk_head_dim" if head_dim == raw.get("qk_head_dim") else "qk_rope_head_dim"
        sizes |= {**_LATENT, "head_dim": _LATENT[width]}
    small: dict[str, Any] = dict.fromkeys(_SPECIAL)
    for name, value in raw.items():
        common = usual.get(name, name)
        if name in _NOT_NEEDED or name.startswith("_"):
            continue
        if common in sizes and (
            type(value) is int or (value is None and common in _DERIVED_WHEN_NONE)
        ):
            small[name] = sizes[common]
        elif isinstance(value, int) and name in _AT_MOST:
            small[name] = min(value, _AT_MOST[name])
        elif isinstance(value, int) and name in _INNER:
            small[name] = HIDDEN * value // hidden // 8 * 8 or HIDDEN
        elif common.endswith("_token_id"):
            small[name] = None if name in _SPECIAL else 0
        elif isinstance(value, list) and len(value) == layers:
            small[name] = value[:few]
        else:
            small[name] = _small_rope(value, ours) if "rope" in name else value
    return small


def _small_rope(value: Any, head_dim: int) -> Any:
    if not isinstance(value, Mapping):
        return value
    rope = {key: _small_rope(each, head_dim) for key, each in value.items()}
    if isinstance(rope.get("original_max_position_embeddings"), int):
        rope["original_max_position_embeddings"] = POSITIONS // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(rope.get(key), list):
            rope[key] = rope[key][: head_dim // 2]
    return rope


def names_of(config: Any) -> dict[str, str]:
    """Usual field names by a transformers configuration's own."""
    return {own: common for common, own in getattr(config, "attribute_map", {}).items()}
