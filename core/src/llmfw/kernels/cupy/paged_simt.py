"""Launcher of paged_simt.cu: the op `paged_attention` for float32 models, all requests alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.attention import parts_of
from llmfw.kernels.cupy.compile import device_index, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.kernels.cupy.paged_decode import check_block_size
from llmfw.kernels.cupy.paged_plan import Heads
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

WARPS = 8
KEYS_OF_A_TILE = 32
MAX_SPLITS = 64
MOST_ROWS = 8
PROMPT_ROWS = 64  # from so many on each warp has rows of its own
PROMPT_WARPS = 4
PROMPT_RESIDENT = 3
COUNTERS = 1 << 16


def supports(context: OpContext) -> str | None:
    """Head sizes of whole packs of 4 up to 576 and 512, which latent caches have."""
    heads = Heads.of(context)
    if heads.head_dim % 4 or heads.v_dim % 4 or heads.head_dim > 576 or heads.v_dim > 512:
        return (
            f"head sizes {heads.head_dim} and {heads.v_dim} are not multiples of 4 up to 576 and "
            "512"
        )
    if heads.num_heads % heads.num_kv_heads:
        return f"{heads.num_heads} heads do not share {heads.num_kv_heads} KV heads evenly"
    return None


@dataclass(frozen=True)
class Plan:
    """How one launch is divided.

    Args:
        rows: Query rows of a block, or of a warp alone, a power of two.
        warps: Warps of a block.
        by_rows: Whether each warp has rows of its own.
        resident: Blocks of one multiprocessor at once, for which registers are left.
        columns: Blocks a request and split.
        splits: Most parts that a request's keys are divided into.
    """

    rows: int
    warps: int
    by_rows: bool
    resident: int
    columns: int
    splits: int


def plan_launch(heads: Heads, requests: int, max_q: int, max_kv: int, sms: int) -> Plan:
    """Divide a batch of at most these lengths over the device; splits fill it once."""
    widest = max(heads.head_dim, heads.v_dim)
    wanted = heads.group * max_q
    most = MOST_ROWS if widest <= 128 else MOST_ROWS // 2 if widest <= 256 else MOST_ROWS // 4
    rows = min(1 << (wanted - 1).bit_length(), most)
    if wanted >= PROMPT_ROWS:
        columns = heads.num_kv_heads * -(-wanted // (rows * PROMPT_WARPS))
        return Plan(rows, PROMPT_WARPS, True, PROMPT_RESIDENT, columns, 1)
    resident = 1 if widest > 128 or rows == MOST_ROWS else 2
    columns = heads.num_kv_heads * -(-wanted // rows)
    blocks = columns * requests
    splits = min(resident * sms // blocks, -(-max_kv // (KEYS_OF_A_TILE * WARPS)), MAX_SPLITS)
    splits = max(1, splits) if blocks <= COUNTERS else 1
    return Plan(rows, WARPS, False, resident, columns, splits)


class _Kernels:
    """The compiled kernels of one head layout, and the counters that blocks meet at."""

    def __init__(self, context: OpContext) -> None:
        self.heads = Heads.of(context)
        self._context = context
        device = context.info.device
        properties = torch.cuda.get_device_properties(device_index(device))
        self.sms = properties.multi_processor_count
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._launchers: dict[Plan, Launcher] = {}

    def launcher(self, plan: Plan) -> Launcher:
        """The kernel for a plan's blocks, compiled when first wanted."""
        kind = replace(plan, columns=0, splits=0)
        found = self._launchers.get(kind)
        if found is None:
            heads, context = self.heads, self._context
            found = load(
                "paged_simt.cu",
                context.info.device,
                context.dtype,
                HEAD_DIM=heads.head_dim,
                V_DIM=heads.v_dim,
                GROUP=heads.group,
                ROWS=plan.rows,
                BLOCK_SIZE=heads.block_size,
                SOFTCAP=int(heads.softcap),
                WARPS=plan.warps,
                BY_ROWS=int(plan.by_rows),
                MIN_BLOCKS=plan.resident,
            ).launcher("paged_simt", "PPPPPPPPPPPqqqqqqiiiiff")
            self._launchers[kind] = found
        return found


def paged_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout. Its launches must follow each other on one
    stream.
    """
    kernels = _Kernels(context)
    heads = kernels.heads

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
        if bool(softcap) != heads.softcap:
            raise KernelError(
                f"attention was built {'with' if heads.softcap else 'without'} a soft cap, "
                f"called with {softcap}",
                hint="name the soft cap when the op is resolved",
            )
        if q.stride(-1) != 1 or q.stride(1) != heads.head_dim:
            q = q.contiguous()
        if sinks is not None and sinks.dtype is not torch.float32:
            sinks = sinks.float()
        width = heads.num_heads * heads.v_dim
        out = torch.empty((q.shape[0], width), dtype=q.dtype, device=q.device)
        for part in parts_of(metadata):
            plan = plan_launch(heads, part.requests, part.max_q, part.max_kv, kernels.sms)
            partial = stats = 0
            if plan.splits > 1:
                slots = part.requests * plan.columns * plan.splits * plan.rows
                workspace = torch.empty(
                    slots * (heads.v_dim + 2), dtype=torch.float32, device=q.device
                )
                partial = workspace.data_ptr()
                stats = partial + slots * heads.v_dim * 4
            kernels.launcher(plan)(
                (plan.columns, plan.splits, part.requests),
                (plan.warps * 32, 1, 1),
                out.data_ptr(),
                q.data_ptr(),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                view.block_tables.data_ptr(),
                metadata.cu_query_lens.data_ptr(),
                metadata.kv_lens_device.data_ptr(),
                pointer(sinks),
                partial,
                stats,
                kernels.counters.data_ptr(),
                q.stride(0),
                view.block_tables.stride(0),
                k_cache.stride(0),
                k_cache.stride(1),
                v_cache.stride(0),
                v_cache.stride(1),
                heads.num_kv_heads,
                part.first,
                window or 0,
                plan.warps,
                scale,
                softcap or 0.0,
            )
        return out

    return call
