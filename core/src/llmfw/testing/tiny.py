"""Tiny configurations: what a plugin declares, or a configuration class's defaults made small."""

from __future__ import annotations

import inspect
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
    "sliding_window": 12,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
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
    """The defaults of transformers' configuration class, in small.

    Raises:
        ConfigError: If transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING

    model_type = model_type_of(architecture)
    config_class = CONFIG_MAPPING[model_type]
    own = _fields_of(config_class)
    renamed = dict(getattr(config_class, "attribute_map", {}) or {})
    defaults = config_class()
    raw: dict[str, Any] = {"model_type": model_type}
    for name, value in _SMALL.items():
        field = renamed.get(name, name)
        present = field in own and getattr(defaults, field, None) is not None
        if present or (field in own and name in ("num_key_value_heads", "head_dim")):
            raw[field] = value
    return raw


def shrink(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A real config.json in small: its switches stay, its sizes do not."""
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    known = model_type in CONFIG_MAPPING
    names = dict(getattr(CONFIG_MAPPING[model_type], "attribute_map", {}) or {}) if known else {}
    small = dict(raw)
    for name, value in _SMALL.items():
        for field in {name, names.get(name, name)}:
            if small.get(field) is not None:
                small[field] = value
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = {heads: 4, 1: 1}.get(kv_heads, 2)
    if small.get("layer_types"):
        kinds = list(dict.fromkeys(small["layer_types"]))
        small["layer_types"] = (kinds + kinds)[:2]
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(small.get(field), Mapping):
            small[field] = _small_rope(small[field])
    for field in ("dtype", "torch_dtype", "quantization_config", *_NO_TOKENS):
        small.pop(field, None)
    return small


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Factors for each feature cut to the small head; the original length to the small one."""
    small = dict(rope)
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

    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == architecture:
            return str(model_type)
    raise ConfigError(
        f"transformers has no causal model called {architecture}",
        hint="give a tiny configuration with its model_type: `tiny_config` in the contract test, "
        f'or tiny_configs = {{"{architecture}": {{...}}}} on the plugin object',
    )


def _fields_of(config_class: type) -> set[str]:
    names = set(inspect.signature(config_class).parameters)
    return names | set(getattr(config_class, "__dataclass_fields__", {}))
