"""The op `paged_attention`: context and generation requests, each by the kernel that suits them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from llmfw.kernels.cupy.paged_decode import PagedDecode, check_block_size
from llmfw.kernels.cupy.prefill import ContextAttention, ContextBatch, Prefill
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a batch that one launch of paged_decode serves."""

    first: int
    requests: int
    max_q: int
    max_kv: int
    settled: bool = False


@dataclass(frozen=True)
class Plan:
    """How a batch is served: what context attention takes of its start, and the rest's parts."""

    contexts: ContextBatch | None
    parts: tuple[Part, ...]


def parts_of(metadata: AttentionMetadata) -> tuple[Part, ...]:
    """Context requests and generation requests, apart; those that are there."""
    count, contexts = metadata.num_requests, metadata.num_contexts
    if not contexts and metadata.max_query_len and metadata.max_kv_len:
        longest_q, longest_kv = metadata.max_query_len, metadata.max_kv_len
        return (Part(0, count, longest_q, longest_kv, settled=longest_q == 1),)
    spans = [(first, last) for first, last in ((0, contexts), (contexts, count)) if last > first]
    return tuple(
        Part(
            first,
            last - first,
            max(metadata.query_lens[first:last]),
            max(metadata.kv_lens[first:last]),
        )
        for first, last in spans
    )


def plan_batch(metadata: AttentionMetadata, prefill: ContextAttention) -> Plan:
    """The parts of a batch; `prefill` takes the context requests where it pays."""
    parts = parts_of(metadata)
    if metadata.num_contexts:
        batch = context_batch(metadata)
        if prefill.serves(batch):
            return Plan(batch, parts[1:])
    return Plan(None, parts)


def context_batch(metadata: AttentionMetadata) -> ContextBatch:
    """The context requests of a batch that has any, with what attention of them wants to know."""
    contexts, device = metadata.num_contexts, metadata.cu_query_lens.device
    kv_lens = metadata.kv_lens[:contexts]
    starts = torch.tensor([0, *itertools.accumulate(kv_lens)], dtype=torch.int32)
    if device.type == "cuda":
        starts = starts.pin_memory().to(device, non_blocking=True)
    return ContextBatch(
        requests=contexts,
        tokens=metadata.num_context_tokens,
        keys=sum(kv_lens),
        query_lens=metadata.query_lens[:contexts],
        kv_lens=kv_lens,
        max_q=max(metadata.query_lens[:contexts]),
        max_kv=max(kv_lens),
        cu_q=metadata.cu_query_lens[: contexts + 1],
        cu_k=starts,
    )


class Once(Generic[T]):
    """What `make` makes of the last batch, so that the layers of one step make it once."""

    def __init__(self, make: Callable[[AttentionMetadata], T]) -> None:
        self._make = make
        self._batch: Callable[[], AttentionMetadata | None] = lambda: None
        self._made: T

    def of(self, metadata: AttentionMetadata) -> T:
        """For this batch."""
        if self._batch() is not metadata:
            self._made = self._make(metadata)
            self._batch = weakref.ref(metadata)
        return self._made


def paged_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout."""
    return mixed_attention(context, Prefill(context))


def mixed_attention(
    context: OpContext, prefill: ContextAttention, copied: bool = False
) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout, with context requests by `prefill`.

    `copied`: Tensor copies bring the other requests' tiles of keys.
    """
    decode = PagedDecode(context, copied)
    heads, plans = decode.heads, Once(lambda metadata: plan_batch(metadata, prefill))

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
        check_block_size(heads.block_size, view.block_size)
        if q.stride(-1) != 1 or q.stride(1) != heads.head_dim or q.data_ptr() % 16:
            q = q.contiguous()
        if sinks is not None and sinks.dtype is not torch.float32:
            sinks = sinks.float()
        plan = plans.of(metadata)
        out: torch.Tensor | None = None
        if plan.contexts is not None:
            first = plan.contexts.tokens
            attended = prefill(
                q[:first],
                k_cache,
                v_cache,
                view.block_tables,
                plan.contexts,
                scale,
                window,
                sinks,
                softcap,
            ).flatten(1)
            if not plan.parts:
                return attended
            out = torch.empty((q.shape[0], attended.shape[1]), dtype=q.dtype, device=q.device)
            out[:first] = attended
        if out is None:
            width = heads.num_heads * heads.v_dim
            out = torch.empty((q.shape[0], width), dtype=q.dtype, device=q.device)
        for part in plan.parts:
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
                settled=part.settled,
            )
        return out

    return call
