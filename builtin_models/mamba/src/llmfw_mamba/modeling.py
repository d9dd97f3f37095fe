"""Mamba (arXiv:2312.00752), Falcon Mamba (arXiv:2410.05355) and Mamba-2 (arXiv:2405.21060)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmfw import (
    AttentionMetadata,
    DecoderLayer,
    DecoderModel,
    DecoderModelForCausalLM,
    ModelConfig,
    RMSNorm,
)
from llmfw_mamba.mixers import Mamba2Mixer, MambaMixer


class StreamNorm(RMSNorm):
    """RMS norm of a stream that may be wider than the model's dtype."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """As `RMSNorm`, of x in the weight's dtype."""
        return super().forward(x.to(self.weight.dtype), residual)


class MambaLayer(DecoderLayer):
    """A norm and a mixer, added to a stream that is kept in float32 where the config says so.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
    """

    def __init__(self, model_config: ModelConfig[Any], layer_idx: int) -> None:
        super().__init__()
        config = model_config.pretrained_config
        self.stream_dtype = torch.float32 if config.residual_in_fp32 else model_config.dtype
        self.norm = StreamNorm(config.hidden_size, config.layer_norm_epsilon)
        mixer = Mamba2Mixer if config.model_type == "mamba2" else MambaMixer
        self.mixer = mixer(model_config, layer_idx)

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer over packed tokens: [tokens, hidden_size] -> [tokens, hidden_size]."""
        mixed = self.mixer(self.norm(hidden_states), attn_metadata)
        return hidden_states.to(self.stream_dtype) + mixed  # type: ignore[no-any-return]


class MambaModel(DecoderModel[Any]):
    """Embedding, layers and norm.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        super().__init__(model_config)
        config = model_config.pretrained_config
        self.embed_tokens = model_config.make(
            "embedding",
            "embed_tokens",
            num_embeddings=config.vocab_size,
            embedding_dim=config.hidden_size,
        )
        self.layers = nn.ModuleList(
            MambaLayer(model_config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = StreamNorm(config.hidden_size, config.layer_norm_epsilon)


class MambaForCausalLM(DecoderModelForCausalLM[MambaModel, Any]):
    """The decoder and its head.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        config = model_config.pretrained_config
        super().__init__(
            MambaModel(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
