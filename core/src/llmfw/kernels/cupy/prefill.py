"""Attention of context requests: K and V are gathered into packed rows for torch's flash attention.

The copy costs a few per cent of the attention itself for prompts of thousands of tokens; in return
whole prompts, chunks of them and prompts after a cached prefix are one case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher
from llmfw.kernels.cupy.paged_plan import REGISTERS_DIM, Heads
from llmfw.ops.kernel import OpContext

THREADS = 256
KEYS = 16  # that one block copies
LEAST_WORK = 2e9  # operations; below them paged_decode's single launch is quicker
LEAST_ROWS = (
    6 << 10
)  # queries of all heads; fewer fill no tiles, while paged_decode splits the keys


class ContextAttention(Protocol):
    """What may serve the context requests of a batch in the place of paged_decode."""

    def serves(self, batch: ContextBatch) -> bool:
        """Whether it can, and is worth it."""

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        batch: ContextBatch,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [tokens, heads, dim] of the context requests -> [tokens, heads, v_dim]."""


@dataclass(frozen=True)
class ContextBatch:
    """The leading requests of a batch.

    Args:
        requests: How many.
        tokens: Their query tokens.
        keys: Their keys.
        query_lens: Query tokens of each.
        kv_lens: Keys of each.
        max_q: Most query tokens of one.
        max_kv: Most keys of one.
        cu_q: int32 [requests + 1], cumulative query tokens (device).
        cu_k: int32 [requests + 1], cumulative keys (device).
    """

    requests: int
    tokens: int
    keys: int
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    max_q: int
    max_kv: int
    cu_q: torch.Tensor
    cu_k: torch.Tensor


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: ContextBatch,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed q [tokens, heads, dim] over packed k, v [keys, kv_heads, dim].

    What `torch.nn.attention.varlen.varlen_attn` calls, without its 50 us a call on the host. The
    last query of each request sees its last key (FlashAttention 2.1 and newer). sinks: float32
    [heads], a logit of each head that stands for no key: the softmax without it, of which torch
    gives the logarithm of the sum, loses the share sigmoid(sink - that).
    """
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        batch.cu_q,
        batch.cu_k,
        batch.max_q,
        batch.max_kv,
        0.0,
        window is None,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
    )
    if sinks is not None:
        kept = torch.sigmoid(log_sum - sinks[:, None])  # [heads, tokens]
        out *= kept.t()[..., None]
    return out  # type: ignore[no-any-return]


def fills_tiles(heads: Heads, batch: ContextBatch) -> bool:
    """Whether a batch has queries enough for tiles of a hundred and more, one a multiprocessor.

    Heads too wide for paged_decode's registers are slow there with however few.
    """
    return batch.tokens * heads.num_heads >= LEAST_ROWS or heads.head_dim > REGISTERS_DIM


class Prefill:
    """Attention of context requests for one head layout."""

    def __init__(self, context: OpContext) -> None:
        self.heads = Heads.of(context)
        self._context = context
        self._gather: Launcher | None = None

    def serves(self, batch: ContextBatch) -> bool:
        """Whether flash attention can do it, and is worth its launches."""
        heads = self.heads
        plain = heads.head_dim == heads.v_dim and not heads.softcap
        work = 4.0 * batch.requests * batch.max_q * batch.max_kv * heads.num_heads * heads.head_dim
        return plain and work >= LEAST_WORK and fills_tiles(heads, batch)

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        batch: ContextBatch,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [tokens, heads, dim] of the context requests -> [tokens, heads, dim]; no softcap."""
        assert not softcap
        k, v = self.gather(k_cache, v_cache, block_tables, batch)
        return flash_attention(q, k, v, batch, scale, window, sinks)

    def gather(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        batch: ContextBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the requests, [keys, kv_heads, dim] each."""
        heads = self.heads
        k, v = (
            cache.new_empty(batch.keys, heads.num_kv_heads, dim)
            for cache, dim in ((k_cache, heads.head_dim), (v_cache, heads.v_dim))
        )
        if self._gather is None:
            self._gather = self._compile()
        self._gather(
            (-(-batch.max_kv // KEYS), batch.requests, 1),
            (THREADS, 1, 1),
            k.data_ptr(),
            v.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_tables.data_ptr(),
            batch.cu_k.data_ptr(),
            block_tables.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
        )
        return k, v

    def _compile(self) -> Launcher:
        heads, context = self.heads, self._context
        pack = 16 // context.dtype.itemsize
        return load(
            "gather_cache.cu",
            context.info.device,
            context.dtype,
            BLOCK_SIZE=heads.block_size,
            K_PACKS=heads.num_kv_heads * heads.head_dim // pack,
            V_PACKS=heads.num_kv_heads * heads.v_dim // pack,
            KEYS=KEYS,
            THREADS=THREADS,
        ).launcher("gather_cache", "PPPPPPqqqqq")
