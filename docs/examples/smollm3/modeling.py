"""SmolLM3: the stock decoder, as its configuration describes it."""

from __future__ import annotations

from typing import Any

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM


class SmolLM3ForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with this model's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(config)
        super().__init__(model_config, spec)
        for layer, rotary in zip(self.model.layers, config.no_rope_layers, strict=True):
            if not rotary:
                layer.self_attn.rotary_emb = None
