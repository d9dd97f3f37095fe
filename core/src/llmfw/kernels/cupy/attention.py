"""The op `paged_attention`: context and generation requests, each by the kernel that suits them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.paged_decode import PagedDecode
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a batch that one launch serves."""

    first: int
    requests: int
    max_q: int
    max_kv: int


def parts_of(metadata: AttentionMetadata) -> tuple[Part, ...]:
    """Context requests and generation requests, apart."""
    count, contexts = metadata.num_requests, metadata.num_contexts
    if not contexts and metadata.max_query_len and metadata.max_kv_len:
        return (Part(0, count, metadata.max_query_len, metadata.max_kv_len),)
    spans = [(first, last) for first, last in ((0, contexts), (contexts, count)) if last > first]
    return tuple(
        Part(
            first,
            last - first,
            max(metadata.query_lens[first:last]),
            max(metadata.max_kv_len, *metadata.kv_lens[first:last]),
        )
        for first, last in spans
    )


class _Plans:
    """The parts of the last batch, so that the layers of one step compute them once."""

    def __init__(self) -> None:
        self._batch: Callable[[], AttentionMetadata | None] = lambda: None
        self._parts: tuple[Part, ...] = ()

    def of(self, metadata: AttentionMetadata) -> tuple[Part, ...]:
        if self._batch() is not metadata:
            self._parts = parts_of(metadata)
            self._batch = weakref.ref(metadata)
        return self._parts


def paged_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout."""
    decode = PagedDecode(context)
    heads, plans = decode.heads, _Plans()

    def call(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        view: CacheGroupView,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if view.block_size != heads.block_size:
            raise KernelError(
                f"attention was built for blocks of {heads.block_size} tokens, "
                f"called with {view.block_size}"
            )
        if q.stride(-1) != 1 or q.stride(1) != heads.head_dim or q.data_ptr() % 16:
            q = q.contiguous()
        out = torch.empty(
            (q.shape[0], heads.num_heads * heads.v_dim), dtype=q.dtype, device=q.device
        )
        if sinks is not None and sinks.dtype is not torch.float32:
            sinks = sinks.float()
        for part in plans.of(metadata):
            decode(
                out,
                q,
                k_cache,
                v_cache,
                view.block_tables,
                metadata.cu_query_lens,
                metadata.kv_lens_device,
                first_request=part.first,
                requests=part.requests,
                max_q=part.max_q,
                max_kv=part.max_kv,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        return out

    return call
