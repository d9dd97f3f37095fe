"""Phi-1 to Phi-2 (arXiv:2306.11644) and Phi-3 to Phi-4 (arXiv:2404.14219), dense.

Phi is a parallel block with layer norms, biases, partial rotary embedding and a plain MLP. Phi-3 is
the stock decoder as its configuration describes it: longrope, partial rotary embedding, window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import Phi3Config, PhiConfig


class PhiForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with the family's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[PhiConfig | Phi3Config]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(config)
        if config.model_type == "phi":
            spec = spec.replace(
                block="parallel",
                gated=False,
                qkv_bias=True,
                o_bias=True,
                mlp_bias=True,
                lm_head_bias=True,
                qk_norm=config.qk_layernorm,
            )
        super().__init__(model_config, spec)
