"""CodeGen: the stock decoder, as its configuration describes it."""

from __future__ import annotations

from typing import Any

from llmfw import DecoderSpec, ModelConfig, RopeParams, StockDecoderForCausalLM


class CodeGenForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with this model's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(
            config,
            block="parallel",
            mlp_bias=True,
            gated=False,
            rope=RopeParams(
                dim=config.rotary_dim,
                max_positions=config.max_position_embeddings,
                interleaved=True,
            ),
            lm_head_bias=True,
        )
        super().__init__(model_config, spec)
