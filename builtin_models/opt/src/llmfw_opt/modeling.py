"""OPT (arXiv:2205.01068): learned positions, layer norms with biases, and a ReLU MLP.

The 350M model differs from the rest: its norms stand after each branch is added, there is no final
norm, and its embeddings are narrower than its layers, with projections in and out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import OPTConfig

from llmfw import (
    Attention,
    AttentionMetadata,
    DecoderLayer,
    DecoderModel,
    DecoderModelForCausalLM,
    Embedding,
    LayerNorm,
    Linear,
    ModelConfig,
)
from llmfw.functional import ACT2FN

POSITION_OFFSET = 2  # the first two rows of the table are never used


def layer_norm(config: OPTConfig) -> LayerNorm:
    """A norm over the hidden states."""
    affine = config.layer_norm_elementwise_affine
    return LayerNorm(config.hidden_size, elementwise_affine=affine)


class OPTDecoderLayer(DecoderLayer):
    """Attention and MLP, each with a norm before it or after it has been added to the stream.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
    """

    def __init__(self, model_config: ModelConfig[OPTConfig], layer_idx: int) -> None:
        super().__init__()
        config = model_config.pretrained_config
        hidden, wide, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        mapping = model_config.mapping
        self.norm_before = config.do_layer_norm_before
        self.self_attn = Attention(
            hidden_size=hidden,
            num_attention_heads=config.num_attention_heads,
            bias=bias,
            out_name="out_proj",
            layer_idx=layer_idx,
            config=model_config,
        )
        self.self_attn_layer_norm = layer_norm(config)
        self.fc1 = Linear(hidden, wide, bias=bias, parallel="column", mapping=mapping)
        self.fc2 = Linear(wide, hidden, bias=bias, parallel="row", mapping=mapping)
        self.final_layer_norm = layer_norm(config)
        self.act = ACT2FN[config.activation_function]

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer over packed tokens: [tokens, hidden_size] -> [tokens, hidden_size]."""
        stream = hidden_states
        hidden = self.self_attn_layer_norm(stream) if self.norm_before else stream
        stream = stream + self.self_attn(position_ids, hidden, attn_metadata)
        if not self.norm_before:
            stream = self.self_attn_layer_norm(stream)
        hidden = self.final_layer_norm(stream) if self.norm_before else stream
        stream = stream + self.fc2(self.act(self.fc1(hidden)))
        return stream if self.norm_before else self.final_layer_norm(stream)  # type: ignore[no-any-return]


class OPTModel(DecoderModel[OPTConfig]):
    """Token and position embeddings, layers, and projections where the embeddings are narrower.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[OPTConfig]) -> None:
        super().__init__(model_config)
        config = model_config.pretrained_config
        hidden, narrow = config.hidden_size, config.word_embed_proj_dim
        projected = narrow != hidden
        self.embed_tokens = Embedding(config.vocab_size, narrow)
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = Embedding(positions, hidden)
        self.project_in = Linear(narrow, hidden, bias=False) if projected else nn.Identity()
        self.project_out = Linear(hidden, narrow, bias=False) if projected else nn.Identity()
        self.layers = nn.ModuleList(
            OPTDecoderLayer(model_config, index) for index in range(config.num_hidden_layers)
        )
        final = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.norm = layer_norm(config) if final else None

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The stream before the first layer: [tokens] -> [tokens, hidden_size]."""
        tokens: torch.Tensor = self.project_in(self.embed_tokens(input_ids))
        return tokens + self.embed_positions(position_ids + POSITION_OFFSET)  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `DecoderModel`, projected to the width of the embeddings."""
        return self.project_out(super().forward(*args, **kwargs))  # type: ignore[no-any-return]


class OPTForCausalLM(DecoderModelForCausalLM[OPTModel, OPTConfig]):
    """The decoder and its head, which shares the embedding.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[OPTConfig]) -> None:
        config = model_config.pretrained_config
        super().__init__(
            OPTModel(model_config),
            config=model_config,
            hidden_size=config.word_embed_proj_dim,
            vocab_size=config.vocab_size,
        )
