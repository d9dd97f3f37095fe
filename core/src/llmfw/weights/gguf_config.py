"""A GGUF file's metadata as HF's `config.json` and `generation_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmfw.errors import ConfigError
from llmfw.weights.gguf_reader import GGUFCheckpoint
from llmfw.weights.gguf_tables import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, Family

_TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# What there must be, where a family has it.
_SIZES = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.kv_lora_rank",
    "ssm.state_size",
    "ssm.inner_size",
    "ssm.time_step_rank",
)
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
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config,
        **{
            ours: _plain(metadata[prefix + key])
            for key, ours in family.config_keys.items()
            if prefix + key in metadata
        },
        **{ours: metadata[key] for key, ours in _TOKEN_IDS.items() if key in metadata},
        **_quotients(metadata, prefix, family),
    }
    tensors = checkpoint.header.tensors
    _require_sizes(checkpoint, prefix)
    if "token_embd.weight" not in tensors:
        raise ConfigError(
            f"{checkpoint.path}: no tensor 'token_embd.weight'", hint="download it again"
        )
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["dtype"] = "bfloat16"
    if "attention.head_count" in family.config_keys:
        _add_attention(checkpoint, prefix, config)
    if "attention.kv_lora_rank" in family.config_keys:
        _add_latent_sizes(checkpoint, prefix, config)
    return config


def _add_attention(checkpoint: GGUFCheckpoint, prefix: str, config: dict[str, Any]) -> None:
    """What only families with attention have: heads, windows, biases and rope."""
    metadata, family = checkpoint.header.metadata, checkpoint.family
    tensors, heads = checkpoint.header.tensors, metadata[f"{prefix}attention.head_count"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = _head_dim(checkpoint, prefix, heads)
    turned = metadata.get(f"{prefix}rope.dimension_count")
    if family.rotary_part is not None and turned is not None:
        config[family.rotary_part] = turned / config["head_dim"]
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    if "blk.0.attn_output.bias" in tensors:
        config["attention_bias"] = True
    if "blk.0.ffn_down.bias" in tensors:
        config["mlp_bias"] = True
    scaling = _rope_scaling(checkpoint, prefix, config)
    if scaling is not None:
        config["rope_scaling"] = {**scaling, **family.rope}


def _add_latent_sizes(checkpoint: GGUFCheckpoint, prefix: str, config: dict[str, Any]) -> None:
    """Sizes of latent attention's heads: newer files call them so, older ones as any model's."""
    metadata, family = checkpoint.header.metadata, checkpoint.family
    attention = f"{prefix}attention."
    sizes = {
        "qk_rope_head_dim": metadata.get(f"{prefix}rope.dimension_count"),
        "key": metadata.get(f"{attention}key_length_mla", metadata.get(f"{attention}key_length")),
        "v_head_dim": metadata.get(
            f"{attention}value_length_mla", metadata.get(f"{attention}value_length")
        ),
    }
    missing = [name for name, size in sizes.items() if not isinstance(size, int) or size <= 0]
    if missing or sizes["key"] <= sizes["qk_rope_head_dim"]:
        raise ConfigError(
            f"{checkpoint.path}: its metadata give no sizes of a head of latent attention",
            hint="use the model's safetensors",
        )
    config["qk_nope_head_dim"] = sizes.pop("key") - sizes["qk_rope_head_dim"]
    config |= sizes
    config["head_dim"] = sizes["qk_rope_head_dim"]
    config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("n_group", 1) > 1:
        config |= family.grouped
    multiplier = metadata.get(f"{prefix}rope.scaling.yarn_log_multiplier")
    if multiplier is not None and "rope_scaling" in config:  # a tenth of both, which are the same
        mscale = round(10 * _plain(multiplier), 6)
        config["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}


def _quotients(metadata: Mapping[str, Any], prefix: str, family: Family) -> dict[str, Any]:
    """Sizes that follow from two others, whole where they come out even."""
    found: dict[str, Any] = {}
    for ours, keys in family.quotients.items():
        above, below = (metadata.get(prefix + key) for key in keys)
        if isinstance(above, int) and isinstance(below, int) and below > 0:
            found[ours] = above / below if above % below else above // below
    return found


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


def _require_sizes(checkpoint: GGUFCheckpoint, prefix: str) -> None:
    metadata, names = checkpoint.header.metadata, checkpoint.family.config_keys
    found = {key: metadata.get(prefix + key) for key in _SIZES if key in names}
    missing = [names[key] for key, size in found.items() if not isinstance(size, int) or size <= 0]
    if missing:
        raise ConfigError(
            f"{checkpoint.path}: its metadata give no single number for {', '.join(missing)}",
            hint="use the model's safetensors",
        )


def _head_dim(checkpoint: GGUFCheckpoint, prefix: str, heads: int) -> int:
    metadata = checkpoint.header.metadata
    keys = ["attention.key_length"]
    if checkpoint.family.rotary_part is None:
        keys.append("rope.dimension_count")
    for key in keys:
        if prefix + key in metadata:
            return int(metadata[prefix + key])
    return int(metadata[f"{prefix}embedding_length"] // heads)


def _rope_scaling(
    checkpoint: GGUFCheckpoint, prefix: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    metadata = checkpoint.header.metadata
    factors = checkpoint.setting(ROPE_FACTORS)
    if factors is not None:
        return _stored_rope(checkpoint, factors, float(config.get("rope_theta", 10000.0)))
    long, short = checkpoint.setting(LONG_FACTORS), checkpoint.setting(SHORT_FACTORS)
    if long is not None and short is not None:
        exact = {"long_factor": long.tolist(), "short_factor": short.tolist()}
        plain = {name: [_plain(value) for value in values] for name, values in exact.items()}
        return {"rope_type": "longrope", **plain}
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
    for name in ("beta_fast", "beta_slow"):
        if f"{prefix}rope.scaling.yarn_{name}" in metadata:
            scaling[name] = _plain(metadata[f"{prefix}rope.scaling.yarn_{name}"])
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
