"""Tiny configurations: what a plugin declares, or a configuration class's defaults made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmfw.errors import ConfigError

LENGTH = 128
_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": LENGTH,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "sliding_window": 12,
    "max_window_layers": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_DROPPED = {"dtype", "torch_dtype", "quantization_config", "transformers_version", "architectures"}
_DROPPED |= {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny_raw_config(architecture: str, tiny_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tiny checkpoint's config.json says.

    Args:
        architecture: Becomes `architectures`.
        tiny_config: The fields; `model_type` is found by the architecture where it is left out.

    Raises:
        ConfigError: If it names no model_type and transformers does not know the architecture.
    """
    raw = {**_NO_TOKENS, **tiny_config, "architectures": [architecture]}
    if "model_type" not in raw:
        raw["model_type"] = model_type_of(architecture)
    return raw


def declared_tiny_config(plugin: object, architecture: str) -> dict[str, Any] | None:
    """The plugin's own `tiny_configs[architecture]`, if it has one."""
    declared = getattr(plugin, "tiny_configs", None) or {}
    found = declared.get(architecture)
    return None if found is None else dict(found)


def shrunk_config(architecture: str) -> dict[str, Any]:
    """The defaults of transformers' configuration class, in small, with grouped heads.

    Raises:
        ConfigError: If transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING

    model_type = model_type_of(architecture)
    small = shrink({**CONFIG_MAPPING[model_type]().to_dict(), "model_type": model_type})
    if "num_key_value_heads" in small and "kv_lora_rank" not in small:  # latents have no groups
        small["num_key_value_heads"] = _SMALL["num_key_value_heads"]
    return small


def shrink(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A real config.json in small: its switches stay, its sizes do not."""
    small = {name: value for name, value in raw.items() if name not in _DROPPED}
    for name, field in _field_names(raw.get("model_type")):
        if small.get(field) is not None and not (name == "n_group" and small[field] == 1):
            small[field] = _SMALL[name]
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = {heads: 4, 1: 1}.get(kv_heads, 2)
    layers = raw.get("num_hidden_layers")
    for name, value in small.items():
        if name in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping):
            small[name] = _small_rope(value)
        elif name.endswith("_config") and isinstance(value, Mapping):
            small[name] = shrink(value)
        elif isinstance(value, list) and layers and len(value) == layers:
            small[name] = _two_of(value)
    return small


def _field_names(model_type: str | None) -> list[tuple[str, str]]:
    """Our names of sizes, each with the names that a configuration may have for it."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING.get(model_type)
    aliases = dict(getattr(known, "attribute_map", None) or {})
    pairs = [(name, name) for name in _SMALL]
    return pairs + [(name, aliases[name]) for name in _SMALL if name in aliases]


def _two_of(values: list[Any]) -> list[Any]:
    """Two entries of a list that has one a layer: of different kinds where there are."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds + kinds)[:2]


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Factors for each feature cut to the small head; the original length to the small one."""
    small: dict[str, Any] = {
        name: _small_rope(value) if isinstance(value, Mapping) else value
        for name, value in rope.items()
    }
    for name in ("short_factor", "long_factor"):
        if isinstance(small.get(name), list):
            small[name] = small[name][: _SMALL["head_dim"] // 2]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = LENGTH // 4
    return small


def model_type_of(architecture: str) -> str:
    """The model_type whose causal model in transformers has this name.

    Raises:
        ConfigError: If there is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = [
        str(model_type)
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if name == architecture
    ]
    if found:  # several families may share a model: the one of that name comes first
        return min(found, key=lambda each: (not _is_named(architecture, each), len(each)))
    raise ConfigError(
        f"transformers has no causal model called {architecture}",
        hint="give a tiny configuration with its model_type: `tiny_config` in the contract test, "
        f'or tiny_configs = {{"{architecture}": {{...}}}} on the plugin object',
    )


def _is_named(architecture: str, model_type: str) -> bool:
    plain = model_type.replace("_", "").replace("-", "")
    return architecture.lower().startswith(plain)
