"""FlashInfer's wrapper as its documentation has it, for tests where FlashInfer is not installed."""

from __future__ import annotations

import math
from typing import Any

import torch


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, computed request by request in torch."""

    made: list[Wrapper]

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, *, backend: str):
        assert float_workspace_buffer.dtype is torch.uint8
        assert kv_layout == "NHD"
        self.backend, self.plans = backend, 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        rows = len(qo_indptr) - 1
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(each.dtype is torch.int32 and each.dim() == 1 for each in indices)
        assert len(paged_kv_indptr) == rows + 1
        assert len(paged_kv_last_page_len) == rows
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert bool((paged_kv_last_page_len >= 1).all())
        assert bool((paged_kv_last_page_len <= page_size).all())
        assert causal
        self.indices = indices
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.page_size, self.dtypes = page_size, (q_data_type, kv_data_type)
        self.limits = (sm_scale, window_left, logits_soft_cap)
        self.plans += 1

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor,
        return_lse: bool = False,
    ) -> Any:
        k_cache, v_cache = paged_kv_cache
        assert (q.shape[1], k_cache.shape[2], q.shape[2]) == self.heads
        assert k_cache.shape == v_cache.shape
        assert k_cache.shape[1] == self.page_size
        assert (q.dtype, k_cache.dtype) == self.dtypes
        starts, first_page, pages, last = (each.tolist() for each in self.indices)
        assert len(q) == starts[-1]
        scale, window_left, softcap = self.limits
        sums = torch.empty(q.shape[:2])
        for row, keys_in_last in enumerate(last):
            mine = pages[first_page[row] : first_page[row + 1]]
            count = (len(mine) - 1) * self.page_size + keys_in_last
            k, v = (cache[mine].flatten(0, 1)[:count].float() for cache in (k_cache, v_cache))
            queries = q[starts[row] : starts[row + 1]].float()
            group = self.heads[0] // self.heads[1]
            scores = torch.einsum("qhd,khd->hqk", queries, k.repeat_interleave(group, 1)) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            own = torch.arange(count - len(queries), count)[:, None]
            key = torch.arange(count)[None]
            hidden = key > own
            if window_left >= 0:
                hidden |= key < own - window_left
            scores = scores.masked_fill(hidden, -math.inf)
            attended = torch.einsum(
                "hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1)
            )
            out[starts[row] : starts[row + 1]] = attended.to(out.dtype)
            sums[starts[row] : starts[row + 1]] = scores.logsumexp(-1).t() / math.log(2)
        return (out, sums) if return_lse else out
