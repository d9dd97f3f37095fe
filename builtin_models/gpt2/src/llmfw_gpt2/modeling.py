"""GPT-2 (Radford et al., 2019): layer norms, learned positions, biases throughout, a plain MLP.

The stock decoder with one switch of its own: `scale_attn_by_inverse_layer_idx` divides a layer's
attention scores by its number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import GPT2Config


class GPT2LMHeadModel(StockDecoderForCausalLM):
    """The stock decoder with GPT-2's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[GPT2Config]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(
            config,
            intermediate_size=config.n_inner or 4 * config.n_embd,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            gated=False,
            learned_positions=config.n_positions,
            attn_scale=None if config.scale_attn_weights else 1.0,
        )
        super().__init__(model_config, spec)
        if config.scale_attn_by_inverse_layer_idx:
            for layer in self.model.layers:
                attention: Any = layer.self_attn
                attention.scale /= attention.layer_idx + 1
