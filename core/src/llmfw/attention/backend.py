"""Attention backends: where K and V lie, and which callables write and read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmfw.attention.metadata import CacheSpec, LayerCache
from llmfw.errors import UsageError
from llmfw.ops.table import reference_of

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

_CACHE_LINE = 64  # bytes; kernels read aligned rows
AttentionOps = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]


@dataclass(frozen=True)
class AttentionBackend:
    """One way to keep and read the cache.

    The paged layout is [blocks, block_size, kv_heads, head_dim] for K and for V; a latent cache is
    one such tensor, and V a view of its first features. `vanilla` always runs the torch references,
    `paged` whatever the op table chose.
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
        shape = (num_blocks, block_size, spec.num_kv_heads)
        k = zeros((*shape, spec.head_dim), spec.dtype, device)
        latent = spec.kind == "latent"
        v = k[..., :v_dim] if latent else zeros((*shape, v_dim), spec.dtype, device)
        return LayerCache(k, v, group)

    def resolve(
        self,
        config: ModelConfig[Any],
        rope_shape: dict[str, int],
        shape: dict[str, int],
        rope_op: str = "rope_and_cache",
    ) -> AttentionOps:
        """The callables for `rope_op` and `paged_attention` of one layer's static shapes."""
        if self.reference_only:
            return reference_of(rope_op), reference_of("paged_attention")
        return (
            config.ops.resolve(rope_op, config.dtype, **rope_shape),
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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU the pages are touched only when first written (torch.zeros: 1 s a GiB)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _CACHE_LINE, dtype=np.uint8)
    skip = -raw.ctypes.data % _CACHE_LINE
    return torch.from_numpy(raw[skip : skip + nbytes]).view(dtype).view(shape)
