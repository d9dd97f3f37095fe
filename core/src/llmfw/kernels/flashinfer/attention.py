"""The op `paged_attention` with context requests by FlashInfer (Ye et al., 2025, arXiv:2501.01005).

FlashInfer reads K and V where they lie in the cache: nothing is gathered. Generation requests, and
prompts too short to pay for planning, go by the CuPy pack's ways.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from llmfw.kernels.cupy.attention import mixed_attention
from llmfw.kernels.cupy.paged_plan import REGISTERS_DIM, Heads
from llmfw.kernels.cupy.prefill import ContextAttention, ContextBatch, Prefill, fills_tiles
from llmfw.kernels.flashinfer.declarations import backend_of
from llmfw.kernels.flashinfer.pages import host_ints, indices_of, pages_of, starts_of
from llmfw.ops.kernel import OpContext

logger = logging.getLogger("llmfw.kernels.flashinfer")

# Bytes that FlashInfer wants for partial results: what its documentation recommends. Its kernels
# for compute capability 9.0 split no keys and leave none.
WORKSPACE = {"fa2": 128 << 20, "fa3": 1 << 20}
LEAST_WORK = 1e10  # operations; below them a plan and FlashInfer's calls cost more than they bring,
LEAST_ALONE = 2e9  # or so many where the other way is paged_decode at its slowest
LN_2 = math.log(2.0)  # FlashInfer's logarithms are to the base 2


def paged_attention(context: OpContext, copied: bool = False) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout; compiles or loads FlashInfer's kernels.

    `copied`: Tensor copies bring tiles of keys for all that is not FlashInfer's.
    """
    prefill = PagedPrefill(context)
    attend = mixed_attention(context, FirstOf(prefill, Prefill(context)), copied)
    attend.details = f"long prompts by FlashInfer's {prefill.backend}"  # type: ignore[attr-defined]
    return attend


def paged_streamed(context: OpContext) -> Callable[..., torch.Tensor]:
    """The same with `copied`."""
    return paged_attention(context, copied=True)


class FirstOf:
    """Attention of context requests by the first way that serves a batch."""

    def __init__(self, *ways: ContextAttention) -> None:
        self._ways = ways

    def serves(self, batch: ContextBatch) -> bool:
        """Whether any of them does."""
        return any(way.serves(batch) for way in self._ways)

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
        """As the one that serves the batch."""
        way = next(way for way in self._ways if way.serves(batch))
        return way(q, k_cache, v_cache, block_tables, batch, scale, window, sinks, softcap)


class PagedPrefill:
    """Attention of context requests for one head layout, planned once for each batch.

    Planning divides the batch over the device on the host and uploads the result from a page-locked
    buffer that FlashInfer keeps, so the next plan waits until that upload is done: it stands at the
    beginning of a step, and so is long done when the next step is prepared.
    """

    def __init__(self, context: OpContext) -> None:
        self.heads = Heads.of(context)
        self.backend = backend_of(context.info)
        self._dtype, self._device = context.dtype, context.info.device
        self._window: int = context.shape.get("window", 0)
        size = WORKSPACE[self.backend]
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._planned: tuple[object, ...] = ()
        self._alive: tuple[object, ...] = ()  # what `_planned` names by its identity
        self._uploaded = torch.cuda.Event() if self._device.type == "cuda" else None
        with torch.device("cpu"):  # a model is built where tensors are on the meta device
            self._wrapper = self._load(workspace)

    def _load(self, workspace: torch.Tensor) -> Any:
        """FlashInfer's wrapper after a first plan, for which its kernels are compiled or loaded.

        What fails, fails here, where another kernel may yet be chosen.
        """
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        logger.info("FlashInfer loads its %s kernels, or compiles them once", self.backend)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self.backend)
        table = torch.zeros(1, 1, dtype=torch.int32, device=self._device)
        softcap = 1.0 if self.heads.softcap else None
        self._plan(wrapper, (1,), (1,), table, 1.0, self._window or None, softcap)
        return wrapper

    def serves(self, batch: ContextBatch) -> bool:
        """Whether it is worth a plan."""
        heads = self.heads
        alone = heads.softcap and heads.head_dim > REGISTERS_DIM
        least = LEAST_ALONE if alone else LEAST_WORK
        return self.work(batch) >= least and fills_tiles(heads, batch)

    def work(self, batch: ContextBatch) -> float:
        """Operations of a batch: products of queries with the keys that they see, and of values."""
        heads, seen = self.heads, self._window or batch.max_kv
        pairs = sum(
            new * min(total - new / 2, seen)
            for new, total in zip(batch.query_lens, batch.kv_lens, strict=True)
        )
        return 4.0 * pairs * heads.num_heads * heads.head_dim

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
        """q [tokens, heads, dim] of the context requests -> [tokens, heads, dim].

        sinks: float32 [heads], a logit of each head that stands for no key; the softmax without it,
        of which FlashInfer gives the logarithm of the sum, loses the share sigmoid(sink - that).
        """
        wanted = (id(batch), id(block_tables), scale, window, softcap)
        if wanted != self._planned:
            lengths = batch.query_lens, batch.kv_lens
            self._plan(self._wrapper, *lengths, block_tables, scale, window, softcap)
            self._planned, self._alive = wanted, (batch, block_tables)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if sinks is None:
            self._wrapper.run(q, (k_cache, v_cache), out=out)
            return out
        _, log_sum = self._wrapper.run(q, (k_cache, v_cache), out=out, return_lse=True)
        kept = torch.sigmoid(log_sum * LN_2 - sinks)  # [tokens, heads]
        return out.mul_(kept[..., None])

    def _plan(
        self,
        wrapper: Any,
        query_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        block_tables: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        heads = self.heads
        pages = pages_of(kv_lens, heads.block_size)
        if self._uploaded is not None:
            self._uploaded.synchronize()
        wrapper.plan(
            host_ints(starts_of(query_lens), self._device),
            host_ints(pages.starts, self._device),
            indices_of(pages, block_tables),
            host_ints(pages.last, self._device),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            heads.block_size,
            causal=True,
            sm_scale=scale,
            window_left=window - 1 if window else -1,
            logits_soft_cap=softcap,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        if self._uploaded is not None:
            self._uploaded.record()
