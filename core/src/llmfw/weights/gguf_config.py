"""A GGUF file's metadata as HF's `config.json` and `generation_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmfw.errors import ConfigError
from llmfw.weights.gguf_reader import GGUFCheckpoint
from llmfw.weights.gguf_tables import CONFIG_KEYS, ROPE_FACTORS

_TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# Constants of the rope that ggml stores as factors, in every published model; they are checked.
_ROPE_ORIGINAL, _ROPE_LOW, _ROPE_HIGH = 8192, 1.0, 4.0


def config_of(checkpoint: GGUFCheckpoint) -> dict[str, Any]:
    """The `config.json` of a GGUF file.

    Raises:
        ConfigError: If the metadata lack a size that a model cannot do without, or scale rope in a
            way not known here.
    """
    metadata, family = checkpoint.header.metadata, checkpoint.family
    prefix = f"{metadata['general.architecture']}."
    keys = {**CONFIG_KEYS, **family.config_keys}
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config,
        **{
            ours: _plain(metadata[prefix + key])
            for key, ours in keys.items()
            if prefix + key in metadata
        },
        **{ours: metadata[key] for key, ours in _TOKEN_IDS.items() if key in metadata},
    }
    names = set(checkpoint.names())
    embedding = checkpoint.info(_require_name(checkpoint, names, "model.embed_tokens.weight"))
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    config["dtype"] = "bfloat16"
    _require_sizes(checkpoint, config)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = _head_dim(metadata, prefix, config)
    if "model.layers.0.self_attn.o_proj.bias" in names:
        config["attention_bias"] = True
    if "model.layers.0.mlp.down_proj.bias" in names:
        config["mlp_bias"] = True
    scaling = _rope_scaling(checkpoint, prefix, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def generation_config_of(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `generation_config.json`: the special tokens, with every token that ends a turn."""
    generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    ends = [
        metadata[f"tokenizer.ggml.{kind}_token_id"]
        for kind in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{kind}_token_id" in metadata
    ]
    unique = list(dict.fromkeys(ends))
    if unique:
        generation["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return generation


def _plain(value: Any) -> Any:
    """A float32 as the shortest decimal that gives it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _require_name(checkpoint: GGUFCheckpoint, names: set[str], name: str) -> str:
    if name not in names:
        raise ConfigError(f"{checkpoint.path}: no tensor '{name}'", hint="download it again")
    return name


def _require_sizes(checkpoint: GGUFCheckpoint, config: Mapping[str, Any]) -> None:
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    missing = [key for key in needed if not isinstance(config.get(key), int) or config[key] <= 0]
    if missing:
        raise ConfigError(
            f"{checkpoint.path}: its metadata give no single number for {', '.join(missing)}",
            hint="use the model's safetensors",
        )


def _head_dim(metadata: Mapping[str, Any], prefix: str, config: Mapping[str, Any]) -> int:
    default = config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.key_length", "rope.dimension_count"):
        if prefix + key in metadata:
            return int(metadata[prefix + key])
    return int(default)


def _rope_scaling(
    checkpoint: GGUFCheckpoint, prefix: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    metadata = checkpoint.header.metadata
    if ROPE_FACTORS in checkpoint.header.tensors:
        factors = checkpoint.rope_factors()
        return _stored_rope(checkpoint, factors, float(config.get("rope_theta", 10000.0)))
    kind = metadata.get(f"{prefix}rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{checkpoint.path}: rope scaling {kind!r} is not read from GGUF files",
            hint="use the model's safetensors",
        )
    scaling = {"rope_type": kind, "factor": _plain(metadata[f"{prefix}rope.scaling.factor"])}
    original = metadata.get(f"{prefix}rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _stored_rope(checkpoint: GGUFCheckpoint, factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """The rope scaling whose factors [head_dim / 2] these are: recomputed and compared."""
    factor = float(factors.max())
    half = factors.numel()
    wavelengths = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    smooth = (_ROPE_ORIGINAL / wavelengths - _ROPE_LOW) / (_ROPE_HIGH - _ROPE_LOW)
    expected = 1 / ((1 - smooth.clamp(0, 1)) / factor + smooth.clamp(0, 1))
    if not torch.allclose(expected, factors.double(), rtol=1e-4):
        raise ConfigError(
            f"{checkpoint.path}: '{ROPE_FACTORS}' are not the factors of a rope scaling known here",
            hint="use the model's safetensors",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _ROPE_LOW,
        "high_freq_factor": _ROPE_HIGH,
        "original_max_position_embeddings": _ROPE_ORIGINAL,
    }
