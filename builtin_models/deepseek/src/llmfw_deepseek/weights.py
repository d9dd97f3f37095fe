"""DeepSeek's names; experts are numbered; layers beyond the last predict further tokens."""

from __future__ import annotations

from typing import Any

from llmfw import WeightMap

MLP = "model.layers.{i}.mlp."
EXPERTS = MLP + "experts"


def weight_map(config: Any) -> WeightMap:
    """The table for a checkpoint of this configuration."""
    layers = config.num_hidden_layers
    table = WeightMap()
    for extra in range(getattr(config, "num_nextn_predict_layers", None) or 0):
        table = table.ignore(f"model.layers.{layers + extra}.{{rest*}}", "predicts further tokens")
    return (
        table.rename(MLP + "shared_experts.{rest*}", MLP + "shared_expert.{rest*}")
        .rename(MLP + "gate.e_score_correction_bias", MLP + "e_score_correction_bias")
        .stack_experts(EXPERTS, EXPERTS + ".{e}", config.n_routed_experts)
    )
