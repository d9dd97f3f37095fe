"""Attention of few query tokens a request: paged_decode.cu, paged_staged.cu, paged_streamed.cu."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import paged_plan
from llmfw.kernels.cupy.compile import device_index, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.kernels.cupy.paged_plan import (
    KEYS_OF_A_TILE,
    LEAST_SHARED_BYTES,
    Cut,
    Device,
    Heads,
    Plan,
    plan_launch,
)
from llmfw.kernels.cupy.tensor_map import cache_map
from llmfw.ops.kernel import OpContext

SIGNATURE = "PPPPPPPPPPPqqqqqqiiiiiiff"
COPIED_SIGNATURE = "PPTTPPPPPPPqqiiiiiiff"
UNSETTLED = 1 << 30  # more keys than any request has


def check_block_size(built: int, called: int) -> None:
    """Hold the cache of a call against the blocks that attention was built for.

    Raises:
        KernelError: If they differ.
    """
    if built != called:
        raise KernelError(
            f"attention was built for blocks of {built} tokens, called with {called}",
            hint="give the cache the block_size of the model's configuration",
        )


def supports(context: OpContext) -> str | None:
    """Head sizes of whole mma tiles up to 256, blocks of whole half tiles."""
    heads = Heads.of(context)
    if context.shape.get("latent"):
        return "reads V from a tensor of its own, not from a latent cache"
    if heads.head_dim % 16 or heads.v_dim % 16 or max(heads.head_dim, heads.v_dim) > 256:
        return f"head sizes {heads.head_dim} and {heads.v_dim} are not multiples of 16 up to 256"
    if heads.block_size % 8:
        return f"block size {heads.block_size} is not a multiple of 8"
    if heads.num_heads % heads.num_kv_heads:
        return f"{heads.num_heads} heads do not share {heads.num_kv_heads} KV heads evenly"
    return None


class Meeting(NamedTuple):
    """Addresses of the parts that blocks leave, of their statistics and of counters; all but the
    counters lie in `memory`, which lives until the launch."""

    memory: torch.Tensor | None
    partial: int
    stats: int
    counters: int


class PagedDecode:
    """The compiled kernels for one head layout, and the counters that its blocks meet at.

    Launches of one instance must follow each other on one stream. With `copied` tensor copies bring
    tiles of keys.
    """

    def __init__(self, context: OpContext, copied: bool = False) -> None:
        self.heads = Heads.of(context)
        self._context = context
        device = context.info.device
        self._launchers: dict[tuple[int, Cut], Launcher] = {}
        properties: Any = torch.cuda.get_device_properties(device_index(device))
        shared = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_BYTES)
        self._device = Device(properties.multi_processor_count, shared)
        self._copied = copied
        self._counters = torch.zeros(paged_plan.COUNTERS, dtype=torch.int32, device=device)

    def plan(self, requests: int, max_q: int, max_kv: int, splits: int | None = None) -> Plan:
        """How a batch of at most these lengths is launched."""
        return plan_launch(self.heads, requests, max_q, max_kv, self._device, splits, self._copied)

    def launcher(self, rows: int, cut: Cut) -> Launcher:
        """The kernel for blocks of so many rows and such a cut, compiled when first wanted."""
        found = self._launchers.get((rows, cut))
        if found is None:
            context, shared = self._context, cut.shared_bytes(self.heads)
            constants = self.constants(rows, cut)
            module = load(f"{cut.source}.cu", context.info.device, context.dtype, **constants)
            signature = COPIED_SIGNATURE if cut.copied else SIGNATURE
            found = module.launcher(cut.source, signature, shared)
            self._launchers[rows, cut] = found
        return found

    def constants(self, rows: int, cut: Cut) -> dict[str, int]:
        """What paged.cuh wants to be told of a kernel for blocks of so many rows."""
        heads = self.heads
        return {
            "HEAD_DIM": heads.head_dim,
            "V_DIM": heads.v_dim,
            "GROUP": heads.group,
            "ROWS": rows,
            "BLOCK_SIZE": heads.block_size,
            "SOFTCAP": int(heads.softcap),
            "WARPS": cut.warps,
            "MIN_BLOCKS": cut.resident,
            **({"STAGES": cut.stages} if cut.stages else {"AHEAD": cut.ahead}),
        }

    def meeting(self, requests: int, plan: Plan) -> Meeting:
        """Where the blocks of a launch meet, if requests are split."""
        counters = self._counters.data_ptr()
        if plan.splits <= 1:
            return Meeting(None, 0, 0, counters)
        slots, v_dim = requests * plan.columns * plan.splits * plan.rows, self.heads.v_dim
        device = self._counters.device
        memory = torch.empty(slots * (v_dim + 2), dtype=torch.float32, device=device)
        partial = memory.data_ptr()
        return Meeting(memory, partial, partial + slots * v_dim * 4, counters)

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        cu_query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        first_request: int,
        requests: int,
        max_q: int,
        max_kv: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        settled: bool = False,
        splits: int | None = None,
    ) -> None:
        """Attend for `requests` requests from `first_request` on, into their rows of `out`.

        out: [T, heads * v_dim]. max_q and max_kv bound the lengths, which the kernel reads from the
        device. settled: all requests of the batch generate one token, so that all keys but the last
        block's are those of earlier steps. `splits` overrides the plan.
        """
        heads = self.heads
        if bool(softcap) != heads.softcap:
            raise KernelError(
                f"paged_decode was built with softcap {heads.softcap}, called with {softcap}"
            )
        plan = self.plan(requests, max_q, max_kv, splits)
        meeting = self.meeting(requests, plan)
        caches: tuple[int | bytes, ...]
        strides: tuple[int, ...] = (q.stride(0), block_tables.stride(0))
        if plan.cut.copied:
            caches = tuple(map(_map_of, (k_cache, v_cache)))
        else:
            caches = (k_cache.data_ptr(), v_cache.data_ptr())
            strides += (*k_cache.stride()[:2], *v_cache.stride()[:2])
        self.launcher(plan.rows, plan.cut)(
            (plan.columns, plan.splits, requests),
            (plan.cut.warps * 32, 1, 1),
            out.data_ptr(),
            q.data_ptr(),
            *caches,
            block_tables.data_ptr(),
            cu_query_lens.data_ptr(),
            kv_lens.data_ptr(),
            pointer(sinks),
            meeting.partial,
            meeting.stats,
            meeting.counters,
            *strides,
            heads.num_kv_heads,
            first_request,
            block_tables.shape[1],
            window or 0,
            plan.least_share,
            heads.block_size if settled else UNSETTLED,
            scale,
            softcap or 0.0,
        )


def _map_of(cache: torch.Tensor) -> bytes:
    """The tensor map of K or V, whose boxes are a head's part of a tile."""
    shape, strides = tuple(cache.shape), cache.stride()
    return cache_map(cache.data_ptr(), shape, strides, cache.dtype, KEYS_OF_A_TILE)
