"""What attention needs to know of a packed batch and of the cache, passed to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class CacheSpec:
    """What one attention module keeps for each token.

    Equal specs form one group with one block table; `kind` is "full", "sliding" or "latent".
    "latent" keeps one tensor of head_dim features, whose first v_head_dim are V.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    v_head_dim: int | None = None
    kind: str = "full"
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in one layer."""
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        width = self.head_dim if self.kind == "latent" else self.head_dim + v_dim
        return self.num_kv_heads * width * self.dtype.itemsize


@dataclass(frozen=True)
class CacheGroupView:
    """The block tables of one group of layers for this batch.

    block_tables: int32 [requests, max_blocks], the physical blocks of each request in order.
    slots: int64 [tokens], block * block_size + offset: where each new token's K and V go.
    """

    block_tables: torch.Tensor
    slots: torch.Tensor
    block_size: int


@dataclass(frozen=True)
class LayerCache:
    """One layer's K and V and the group it belongs to.

    k: [blocks, block_size, kv_heads, head_dim], v: [blocks, block_size, kv_heads, v_head_dim]; of
    a latent cache v is a view of k.
    """

    k: torch.Tensor
    v: torch.Tensor
    group: int = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What holds it: k and v, or k alone where v is a view of it."""
        shared = self.v.untyped_storage().data_ptr() == self.k.untyped_storage().data_ptr()
        return (self.k,) if shared else (self.k, self.v)


@dataclass(frozen=True)
class AttentionMetadata:
    """The packed batch as attention sees it: context (prefill) requests, then generation requests.

    A request may have any number of query tokens: a whole prompt, a chunk of it, one, or a few.

    query_lens: new tokens of each request (host).
    kv_lens: tokens of each request after this step, the new ones included (host).
    num_contexts: how many of the leading requests are context requests.
    cu_query_lens: int32 [requests + 1], cumulative query_lens (device).
    kv_lens_device: int32 [requests] (device).
    positions: int64 [tokens], position of each new token (device).
    logits_indices: int64 [rows] of the packed tokens whose logits are wanted (device), or None for
        all.
    groups: block tables and slots by cache group.
    caches: K and V by layer index.
    max_query_len, max_kv_len: upper bounds, on the host.
    states: by layer index the state of recurrent modules, by name [slots, ...] of all requests;
        that of a request that begins with this step is zeros.
    state_slots: int64 [requests], where in them each request's state lies (device); None for a
        model without.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_contexts: int
    cu_query_lens: torch.Tensor
    kv_lens_device: torch.Tensor
    positions: torch.Tensor
    groups: tuple[CacheGroupView, ...]
    caches: Mapping[int, LayerCache]
    logits_indices: torch.Tensor | None = None
    max_query_len: int = 0
    max_kv_len: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)
    states: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    state_slots: torch.Tensor | None = None

    @property
    def num_requests(self) -> int:
        """Requests in the batch."""
        return len(self.query_lens)

    @property
    def num_generations(self) -> int:
        """Generation (decode) requests in the batch."""
        return len(self.query_lens) - self.num_contexts

    @cached_property
    def generations(self) -> AttentionMetadata:
        """The batch without its context requests."""
        first, tokens = self.num_contexts, self.num_context_tokens
        query_lens, kv_lens = self.query_lens[first:], self.kv_lens[first:]
        slots = self.state_slots
        return replace(
            self,
            query_lens=query_lens,
            kv_lens=kv_lens,
            num_contexts=0,
            cu_query_lens=self.cu_query_lens[first:] - tokens,
            kv_lens_device=self.kv_lens_device[first:],
            positions=self.positions[tokens:],
            groups=tuple(
                replace(view, block_tables=view.block_tables[first:], slots=view.slots[tokens:])
                for view in self.groups
            ),
            logits_indices=None,
            max_query_len=max(query_lens, default=0),
            max_kv_len=max(kv_lens, default=0),
            state_slots=None if slots is None else slots[first:],
        )

    @property
    def num_context_tokens(self) -> int:
        """Packed tokens that belong to context requests; they come first."""
        return sum(self.query_lens[: self.num_contexts])
