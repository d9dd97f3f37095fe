"""A model in one file: GPT-NeoX's block with one norm, as Pythia might have had it."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM, WeightMap, register_auto_model


@register_auto_model("MyModelForCausalLM")
class MyModelForCausalLM(StockDecoderForCausalLM):
    """A decoder whose attention and MLP stand side by side, with layer norms and a plain MLP.

    Args:
        model_config: The model's configuration.
    """

    weight_map = WeightMap().rename("my.{rest*}", "model.{rest*}")

    def __init__(self, model_config: ModelConfig[LlamaConfig]) -> None:
        config: Any = model_config.pretrained_config
        spec = DecoderSpec.from_config(
            config, block="parallel", norm="layer", gated=False, activation="gelu", mlp_bias=True
        )
        super().__init__(model_config, spec)
