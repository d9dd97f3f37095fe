"""gpt-oss's names; experts are stacked as [experts, in, out], gate and up in alternating columns.

A GGUF file has gate and up apart, as [experts, out, in].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import WeightMap

if TYPE_CHECKING:
    from transformers import GptOssConfig

MLP = "model.layers.{i}.mlp."
EXPERTS = MLP + "experts"
APART = ((-1, 2), (1, 0))  # gate, up, gate, up, ... -> all of gate, then all of up


def weight_map(config: GptOssConfig) -> WeightMap:
    """The table for a checkpoint of this configuration."""
    return (
        WeightMap()
        .rename(MLP + "router.{p}", MLP + "gate.{p}")
        .transpose(EXPERTS + ".gate_up_proj")
        .transpose(EXPERTS + ".down_proj")
        .reorder(EXPERTS + ".gate_up_proj", *APART, dim=1)
        .reorder(EXPERTS + ".gate_up_proj_bias", *APART, dim=1)
        .stack_experts(EXPERTS, EXPERTS + ".{e}", config.num_local_experts)
    )
