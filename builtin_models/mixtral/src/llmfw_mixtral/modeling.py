"""Mixtral (arXiv:2401.04088): the stock decoder with a mixture of experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import DecoderSpec, ModelConfig, MoEParams, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import MixtralConfig


class MixtralForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with experts, whose weights are the softmax over the chosen ones.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[MixtralConfig]) -> None:
        config = model_config.pretrained_config
        moe = MoEParams.from_config(config, scoring="topk_softmax")
        super().__init__(model_config, DecoderSpec.from_config(config, moe=moe))
