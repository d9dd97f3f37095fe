"""Attention: the metadata of a packed batch, cache layouts and backends."""

from llmfw.attention.backend import BACKENDS, AttentionBackend, get_attention_backend
from llmfw.attention.metadata import AttentionMetadata, CacheGroupView, CacheSpec, LayerCache
from llmfw.attention.state import StateCache, StateSpec, StateTensor

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionMetadata",
    "CacheGroupView",
    "CacheSpec",
    "LayerCache",
    "StateCache",
    "StateSpec",
    "StateTensor",
    "get_attention_backend",
]
