"""Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388), dense and with a mixture of experts.

The stock decoder with two differences: Qwen2 has biases on q, k and v alone; Qwen3 normalises q
and k a head. Qwen2's mixture has a shared expert with a gate, Qwen3's has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw import DecoderSpec, ModelConfig, MoEParams, StockDecoderForCausalLM

if TYPE_CHECKING:
    from typing import TypeAlias

    from transformers import Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

    AnyQwenConfig: TypeAlias = Qwen2Config | Qwen3Config | Qwen2MoeConfig | Qwen3MoeConfig


class QwenForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with the family's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[AnyQwenConfig]) -> None:
        config: Any = model_config.pretrained_config
        spec = DecoderSpec.from_config(config)
        if config.model_type.startswith("qwen2"):
            spec = spec.replace(qkv_bias=getattr(config, "qkv_bias", True), o_bias=False)
        else:
            spec = spec.replace(qk_norm=True)
        if config.model_type.endswith("_moe"):
            shared_size = getattr(config, "shared_expert_intermediate_size", None)
            spec = spec.replace(
                moe=MoEParams.from_config(config, shared_size=shared_size, shared_gated=True),
                moe_layers=tuple(has_experts(config, index) for index in range(spec.num_layers)),
            )
        super().__init__(model_config, spec)


def has_experts(config: Any, layer_idx: int) -> bool:
    """Whether a layer has the mixture of experts; the others have a plain gated MLP."""
    every = (layer_idx + 1) % config.decoder_sparse_step == 0
    return every and layer_idx not in config.mlp_only_layers
