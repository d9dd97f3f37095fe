"""From the checkpoint's names to the module tree's."""

from __future__ import annotations

from typing import Any

from llmfw import WeightMap


def weight_map(config: Any) -> WeightMap:
    """The table for a model of this configuration's sizes."""
    return (
        WeightMap()
        .reorder(
            "transformer.h.{i}.self_attention.query_key_value.{p}",
            (config.num_attention_heads, 3, -1),
            (1, 0, 2),
        )
        .rename(
            "transformer.h.{i}.self_attention.dense.{p}", "model.layers.{i}.self_attn.o_proj.{p}"
        )
        .rename(
            "transformer.h.{i}.self_attention.query_key_value.{p}",
            "model.layers.{i}.self_attn.qkv_proj.{p}",
        )
        .rename(
            {
                "transformer.ln_f.{p}": "model.norm.{p}",
                "transformer.word_embeddings.{p}": "model.embed_tokens.{p}",
                "transformer.word_embeddings_layernorm.{p}": "model.embed_tokens.norm.{p}",
                "transformer.h.{i}.mlp.dense_4h_to_h.{p}": "model.layers.{i}.mlp.down_proj.{p}",
                "transformer.h.{i}.mlp.dense_h_to_4h.{p}": "model.layers.{i}.mlp.up_proj.{p}",
                "transformer.h.{i}.{rest*}": "model.layers.{i}.{rest*}",
            }
        )
    )
