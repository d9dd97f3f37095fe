"""Attention backends: where K and V lie, and which callables write and read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmfw.attention.metadata import CacheSpec, LayerCache
from llmfw.errors import UsageError
from llmfw.ops.table import reference_of

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

AttentionOps = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]


@dataclass(frozen=True)
class AttentionBackend:
    """One way to keep and read the cache.

    The paged layout is [blocks, block_size, kv_heads, head_dim] for K and for V. `vanilla` always
    runs the torch references, `paged` whatever the op table chose.
    """

    name: str
    reference_only: bool

    def allocate(
        self,
        spec: CacheSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        group: int = 0,
    ) -> LayerCache:
        """A layer's cache of `num_blocks` blocks, zeroed."""
        v_dim = spec.head_dim if spec.v_head_dim is None else spec.v_head_dim
        k = torch.zeros(
            num_blocks,
            block_size,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=spec.dtype,
            device=device,
        )
        v = torch.zeros(
            num_blocks, block_size, spec.num_kv_heads, v_dim, dtype=spec.dtype, device=device
        )
        return LayerCache(k, v, group)

    def resolve(
        self, config: ModelConfig[Any], rope_shape: dict[str, int], shape: dict[str, int]
    ) -> AttentionOps:
        """The callables for `rope_and_cache` and `paged_attention` of one layer's static shapes."""
        if self.reference_only:
            return reference_of("rope_and_cache"), reference_of("paged_attention")
        return (
            config.ops.resolve("rope_and_cache", config.dtype, **rope_shape),
            config.ops.resolve("paged_attention", config.dtype, **shape),
        )


BACKENDS = {
    "vanilla": AttentionBackend("vanilla", reference_only=True),
    "paged": AttentionBackend("paged", reference_only=False),
}


def get_attention_backend(name: str) -> AttentionBackend:
    """The backend of that name; "auto" is "paged".

    Raises:
        UsageError: If the name is not known.
    """
    name = "paged" if name == "auto" else name.lower()
    if name not in BACKENDS:
        raise UsageError(
            f"attention backend {name!r} is not known", hint=f"known: auto, {', '.join(BACKENDS)}"
        )
    return BACKENDS[name]
