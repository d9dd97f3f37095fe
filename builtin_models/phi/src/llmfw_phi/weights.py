"""Phi's names. Phi-3's are the module tree's: its fused tensors are cut as the modules declare."""

from __future__ import annotations

from llmfw import WeightMap

LAYER = "model.layers.{i}."

WEIGHTS = WeightMap().rename(
    {
        LAYER + "self_attn.dense.{p}": LAYER + "self_attn.o_proj.{p}",
        LAYER + "self_attn.q_layernorm.{p}": LAYER + "self_attn.q_norm.{p}",
        LAYER + "self_attn.k_layernorm.{p}": LAYER + "self_attn.k_norm.{p}",
        LAYER + "mlp.fc1.{p}": LAYER + "mlp.up_proj.{p}",
        LAYER + "mlp.fc2.{p}": LAYER + "mlp.down_proj.{p}",
        "model.final_layernorm.{p}": "model.norm.{p}",
    }
)
