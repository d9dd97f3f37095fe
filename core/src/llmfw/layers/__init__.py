"""The layers models are made of. They declare shapes and shards, and import no hook."""

from llmfw.layers.activation import GatedActivation
from llmfw.layers.attention import Attention
from llmfw.layers.causal_conv import CausalConv1d
from llmfw.layers.embedding import Embedding, LMHead
from llmfw.layers.latent import MLAParams
from llmfw.layers.layer import Layer
from llmfw.layers.linear import ColumnLinear, Linear, RowLinear
from llmfw.layers.mla import MLA
from llmfw.layers.mlp import MLP, GatedMLP
from llmfw.layers.moe import Experts, MoE, MoEParams
from llmfw.layers.norm import GatedRMSNorm, LayerNorm, RMSNorm
from llmfw.layers.positional import PositionalEmbeddingParams, PositionEmbeddingType
from llmfw.layers.rope import RopeParams
from llmfw.layers.rotary import RotaryEmbedding
from llmfw.layers.stock import stock_layer

__all__ = [
    "MLA",
    "MLP",
    "Attention",
    "CausalConv1d",
    "ColumnLinear",
    "Embedding",
    "Experts",
    "GatedActivation",
    "GatedMLP",
    "GatedRMSNorm",
    "LMHead",
    "Layer",
    "LayerNorm",
    "Linear",
    "MLAParams",
    "MoE",
    "MoEParams",
    "PositionEmbeddingType",
    "PositionalEmbeddingParams",
    "RMSNorm",
    "RopeParams",
    "RotaryEmbedding",
    "RowLinear",
    "stock_layer",
]
