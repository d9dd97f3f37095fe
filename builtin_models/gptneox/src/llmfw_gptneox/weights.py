"""GPT-NeoX's names; q, k and v are stored in one, head by head."""

from __future__ import annotations

from transformers import GPTNeoXConfig

from llmfw import WeightMap

LAYER = "gpt_neox.layers.{i}."
OURS = "model.layers.{i}."


def weight_map(config: GPTNeoXConfig) -> WeightMap:
    """The table for a checkpoint of this configuration."""
    qkv = OURS + "self_attn.qkv_proj.{p}"
    return (
        WeightMap()
        .ignore(LAYER + "attention.bias", "the causal mask, computed here")
        .ignore(LAYER + "attention.masked_bias", "the causal mask, computed here")
        .rename(
            {
                "gpt_neox.embed_in.weight": "model.embed_tokens.weight",
                LAYER + "{norm}.{p}": OURS + "{norm}.{p}",
                LAYER + "attention.query_key_value.{p}": qkv,
                LAYER + "attention.dense.{p}": OURS + "self_attn.o_proj.{p}",
                LAYER + "mlp.dense_h_to_4h.{p}": OURS + "mlp.up_proj.{p}",
                LAYER + "mlp.dense_4h_to_h.{p}": OURS + "mlp.down_proj.{p}",
                "gpt_neox.final_layer_norm.{p}": "model.norm.{p}",
                "embed_out.weight": "lm_head.weight",
            }
        )
        .reorder(qkv, (config.num_attention_heads, 3, -1), (1, 0, 2))
    )
