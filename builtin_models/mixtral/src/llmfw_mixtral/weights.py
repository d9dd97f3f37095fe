"""Mixtral's names; its experts are numbered, with w1 inside the activation and w2 the last."""

from __future__ import annotations

from transformers import MixtralConfig

from llmfw import WeightMap

LAYER = "model.layers.{i}."


def weight_map(config: MixtralConfig) -> WeightMap:
    """The table for a checkpoint of this configuration."""
    experts = LAYER + "mlp.experts"
    return (
        WeightMap()
        .rename(LAYER + "block_sparse_moe.{rest*}", LAYER + "mlp.{rest*}")
        .stack_experts(experts, experts + ".{e}", config.num_local_experts, "w1", "w3", "w2")
    )
