"""Gemma (arXiv:2403.08295), Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786), text.

All store their norms' weights minus one and scale the embeddings. Gemma 2 has four norms a layer,
alternating windows and soft caps; Gemma 3 norms of q and k, and rotates windowed layers with
another base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw import ConfigError, DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from typing import TypeAlias

    from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig

    AnyGemmaConfig: TypeAlias = GemmaConfig | Gemma2Config | Gemma3TextConfig | Gemma3Config


class GemmaForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with the family's switches.

    Args:
        model_config: The model's configuration.

    Raises:
        ConfigError: If the model attends in both directions: it generates no text.
    """

    def __init__(self, model_config: ModelConfig[AnyGemmaConfig]) -> None:
        config: Any = model_config.pretrained_config
        config = getattr(config, "text_config", config)
        if getattr(config, "use_bidirectional_attention", False):
            raise ConfigError("use_bidirectional_attention: an embedding model generates no text")
        spec = DecoderSpec.from_config(config, norm_offset=1.0, embed_scale=config.hidden_size**0.5)
        gemma3 = config.model_type == "gemma3_text"
        if gemma3 or config.model_type == "gemma2":
            spec = spec.replace(
                block="sandwich",
                attn_scale=config.query_pre_attn_scalar**-0.5,
                attn_softcap=None if gemma3 else config.attn_logit_softcapping,
                logit_softcap=config.final_logit_softcapping,
                qk_norm=gemma3,
            )
        super().__init__(model_config, spec)
