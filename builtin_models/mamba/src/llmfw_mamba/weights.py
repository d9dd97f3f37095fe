"""From the checkpoint's names to the module tree's."""

from __future__ import annotations

from llmfw import WeightMap

WEIGHTS = WeightMap().rename(
    {
        "backbone.embedding.weight": "model.embed_tokens.weight",  # in some published files
        "backbone.embeddings.weight": "model.embed_tokens.weight",
        "backbone.layers.{i}.mixer.dt_proj.bias": "model.layers.{i}.mixer.dt_bias",
        "backbone.layers.{rest*}": "model.layers.{rest*}",
        "backbone.norm_f.weight": "model.norm.weight",
    }
)
