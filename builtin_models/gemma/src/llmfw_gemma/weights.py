"""The module tree's names; a checkpoint with a vision part has its text part under a prefix."""

from __future__ import annotations

from llmfw import WeightMap

WEIGHTS = (
    WeightMap()
    .rename("language_model.{rest*}", "{rest*}")
    .rename("model.language_model.{rest*}", "model.{rest*}")
    .rename("model.vision_tower.{rest*}", "vision_tower.{rest*}")
    .rename("model.multi_modal_projector.{rest*}", "multi_modal_projector.{rest*}")
    .ignore("vision_tower.{rest*}", "only text is served")
    .ignore("multi_modal_projector.{rest*}", "only text is served")
)
