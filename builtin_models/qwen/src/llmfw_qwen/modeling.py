"""Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388), dense.

The stock decoder with two differences: Qwen2 has biases on q, k and v alone; Qwen3 normalises q
and k a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen3Config


class QwenForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with the family's two switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Qwen2Config | Qwen3Config]) -> None:
        config = model_config.pretrained_config
        if config.model_type == "qwen2":
            spec = DecoderSpec.from_config(config, qkv_bias=True, o_bias=False)
        else:
            spec = DecoderSpec.from_config(config, qk_norm=True)
        super().__init__(model_config, spec)
