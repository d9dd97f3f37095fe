"""Bloom: the stock decoder with attention that is biased by distance."""

from __future__ import annotations

from typing import Any

import torch

from llmfw import (
    Attention,
    AttentionMetadata,
    DecoderSpec,
    Embedding,
    LayerNorm,
    ModelConfig,
    StockDecoderForCausalLM,
)


class AlibiAttention(Attention):
    """Attention whose scores are lower by the distance, times a slope of the head (2108.12409).

    Softmax sees slope * key position alone, for the query's is the same in all of a row. So it is
    a product of two more features: keys have their position in them, as 128 a + b, which bfloat16
    holds exactly below 32,768; queries have the slope over the scale.
    """

    MORE = 16  # features of a head beyond its own: two that count; GPU kernels take multiples of 16

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.narrow = self.head_dim
        self.head_dim += self.MORE  # of the cache and of the kernels; projections are made

    def post_load(self) -> None:
        """Make the slopes where the weights are."""
        super().post_load()
        slopes = torch.tensor(alibi_slopes(self.num_heads), device=self.qkv_proj.weight.device)
        self.slopes = slopes / self.scale

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size] at position_ids [tokens] -> [tokens, hidden_size]."""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, self.narrow))
        wide = torch.nn.functional.pad(heads, (0, self.MORE))  # [tokens, 3, heads, head_dim]
        high = position_ids.div(128, rounding_mode="floor")
        wide[:, 0, :, self.narrow] = 128 * self.slopes
        wide[:, 0, :, self.narrow + 1] = self.slopes
        wide[:, 1, :, self.narrow] = high[:, None]
        wide[:, 1, :, self.narrow + 1] = (position_ids - 128 * high)[:, None]
        attended = self.attend(wide.flatten(1), position_ids, attn_metadata)
        attended = attended.unflatten(-1, (self.num_heads, -1))[..., : self.narrow]
        return self.o_proj(attended.flatten(1))


def alibi_slopes(heads: int) -> list[float]:
    """2 ** (-8 i / n) for the power of two n below; the rest lie between them."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [4 * i / power for i in range(1, 2 * (heads - power), 2)]
    return [2.0**-exponent for exponent in exponents]


class NormedEmbedding(Embedding):
    """An embedding whose rows are normalised."""

    def __init__(self, rows: int, width: int, eps: float) -> None:
        super().__init__(rows, width)
        self.norm = LayerNorm(width, eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [tokens] -> [tokens, width]."""
        return self.norm(super().forward(input_ids))


class BloomForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with this model's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(
            config,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            gated=False,
            activation="gelu_pytorch_tanh",
        )
        super().__init__(model_config, spec)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = AlibiAttention(
                hidden_size=spec.hidden_size,
                num_attention_heads=spec.num_heads,
                config=model_config,
                layer_idx=index,
                bias=True,
            )
        embedding = NormedEmbedding(spec.vocab_size, spec.hidden_size, spec.norm_eps)
        self.model.embed_tokens = embedding
        self.lm_head.tie_weights(embedding)
