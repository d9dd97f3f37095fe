"""From the checkpoint's names to the module tree's."""

from __future__ import annotations

from llmfw import WeightMap

WEIGHTS = (
    WeightMap()
    .rename("decoder.{rest*}", "model.decoder.{rest*}")  # files of the bare decoder
    .rename("model.decoder.final_layer_norm.{p}", "model.norm.{p}")
    .rename("model.decoder.{rest*}", "model.{rest*}")
)
