"""From the checkpoint's names to the module tree's."""

from __future__ import annotations

from llmfw import WeightMap

QKV = "transformer.h.{i}.attn.qkv_proj.{p}"
PARTS = [f"model.layers.{{i}}.self_attn.{x}_proj.{{p}}" for x in "qvk"]

WEIGHTS = (
    WeightMap()
    .reorder(QKV, (4, 3, -1), (1, 0, 2))  # stored in four blocks, each with its q, v and k
    .split(QKV, PARTS)
    .rename(
        {
            "transformer.ln_f.{p}": "model.norm.{p}",
            "transformer.wte.{p}": "model.embed_tokens.{p}",
            "transformer.h.{i}.attn.out_proj.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
            "transformer.h.{i}.mlp.fc_in.{p}": "model.layers.{i}.mlp.up_proj.{p}",
            "transformer.h.{i}.mlp.fc_out.{p}": "model.layers.{i}.mlp.down_proj.{p}",
            "transformer.h.{i}.ln_1.{p}": "model.layers.{i}.input_layernorm.{p}",
        }
    )
)
