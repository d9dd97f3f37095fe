"""LLaMA (arXiv:2307.09288, arXiv:2407.21783) and Mistral (arXiv:2310.06825).

RMS norms, rotary embedding, grouped-query attention and a SiLU-gated MLP: the stock decoder, as
the configuration describes it (attention_bias, mlp_bias, head_dim, rope kind, sliding window, tied
head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig


class LlamaForCausalLM(StockDecoderForCausalLM):
    """The stock decoder under its family's name.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[LlamaConfig | MistralConfig]) -> None:
        super().__init__(model_config, DecoderSpec.from_config(model_config.pretrained_config))
