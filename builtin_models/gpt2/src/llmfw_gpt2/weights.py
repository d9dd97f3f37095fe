"""GPT-2's names; its linear layers are stored as [in, out], q, k and v in one."""

from __future__ import annotations

from llmfw import WeightMap

WEIGHTS = (
    WeightMap()
    .rename("transformer.{rest*}", "{rest*}")
    .ignore("h.{i}.attn.bias", "the causal mask, computed here")
    .ignore("h.{i}.attn.masked_bias", "the causal mask, computed here")
    .transpose("h.{i}.{block}.{linear}.weight")
    .rename(
        {
            "wte.weight": "model.embed_tokens.weight",
            "wpe.weight": "model.embed_positions.weight",
            "h.{i}.ln_1.{p}": "model.layers.{i}.input_layernorm.{p}",
            "h.{i}.attn.c_attn.{p}": "model.layers.{i}.self_attn.qkv_proj.{p}",
            "h.{i}.attn.c_proj.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
            "h.{i}.ln_2.{p}": "model.layers.{i}.post_attention_layernorm.{p}",
            "h.{i}.mlp.c_fc.{p}": "model.layers.{i}.mlp.up_proj.{p}",
            "h.{i}.mlp.c_proj.{p}": "model.layers.{i}.mlp.down_proj.{p}",
            "ln_f.{p}": "model.norm.{p}",
        }
    )
)
