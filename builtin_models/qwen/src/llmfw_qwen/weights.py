"""The checkpoint's names are the module tree's; q/k/v and gate/up fuse as the modules say.

Experts are numbered in the checkpoint and stacked here.
"""

from __future__ import annotations

from typing import Any

from llmfw import WeightMap

EXPERTS = "model.layers.{i}.mlp.experts"


def weight_map(config: Any) -> WeightMap:
    """The table for a checkpoint of this configuration."""
    if not config.model_type.endswith("_moe"):
        return WeightMap()
    return WeightMap().stack_experts(EXPERTS, EXPERTS + ".{e}", config.num_experts)
