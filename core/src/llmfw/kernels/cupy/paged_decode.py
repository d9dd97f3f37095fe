"""Launcher of paged_decode.cu: attention of few query tokens a request over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.compile import device_index, load
from llmfw.kernels.cupy.launch import pointer
from llmfw.ops.kernel import OpContext

WARPS = 4
MAX_SPLITS = 64
KEYS_OF_A_ROUND = 16 * WARPS  # the least work of a block
COUNTERS = 1 << 16
WAVES = 4  # blocks wanted for each that fits the device at once: evens out unequal lengths


@dataclass(frozen=True)
class Heads:
    """The static shape of one kind of attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    block_size: int
    softcap: bool

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def of(cls, context: OpContext) -> Heads:
        """From the op's context."""
        return cls(
            context["num_heads"],
            context["num_kv_heads"],
            context["head_dim"],
            context.shape.get("v_head_dim") or context["head_dim"],
            context["block_size"],
            bool(context.shape.get("softcap", 0)),
        )


def supports(context: OpContext) -> str | None:
    """Head sizes of whole mma tiles up to 256, blocks of whole half tiles."""
    heads = Heads.of(context)
    if heads.head_dim % 16 or heads.v_dim % 16 or max(heads.head_dim, heads.v_dim) > 256:
        return f"head sizes {heads.head_dim} and {heads.v_dim} are not multiples of 16 up to 256"
    if heads.block_size % 8:
        return f"block size {heads.block_size} is not a multiple of 8"
    if heads.num_heads % heads.num_kv_heads:
        return f"{heads.num_heads} heads do not share {heads.num_kv_heads} KV heads evenly"
    return None


def resident_blocks(dim: int) -> int:
    """Blocks of one multiprocessor at once, which sets the registers that each may use."""
    return 4 if dim <= 64 else 3 if dim <= 96 else 2 if dim <= 128 else 1


class PagedDecode:
    """The compiled kernels for one head layout, and the counters that its blocks meet at.

    Launches of one instance must follow each other on one stream.
    """

    def __init__(self, context: OpContext) -> None:
        self.heads = heads = Heads.of(context)
        device, widest = context.info.device, max(heads.head_dim, heads.v_dim)
        self.resident = resident_blocks(widest)
        row_tiles = (8,) if widest > 128 else (8, 16)
        self._launch = {
            rows: load(
                "paged_decode.cu",
                device,
                context.dtype,
                HEAD_DIM=heads.head_dim,
                V_DIM=heads.v_dim,
                GROUP=heads.group,
                ROWS=rows,
                BLOCK_SIZE=heads.block_size,
                SOFTCAP=int(heads.softcap),
                WARPS=WARPS,
                MIN_BLOCKS=self.resident,
            ).launcher("paged_decode", "PPPPPPPPPPPqqqqqqiiiff")
            for rows in row_tiles
        }
        properties = torch.cuda.get_device_properties(device_index(device))
        self._sms = properties.multi_processor_count
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def grid(self, requests: int, max_q: int, max_kv: int) -> tuple[int, int, int]:
        """(rows of a tile, blocks a request, splits) for a batch of at most these lengths."""
        rows = self.heads.group * max_q
        tile = 8 if rows <= 8 or 16 not in self._launch else 16
        columns = self.heads.num_kv_heads * -(-rows // tile)
        blocks = columns * requests
        wanted = -(-WAVES * self._sms * self.resident // blocks)
        splits = max(1, min(wanted, MAX_SPLITS, -(-max_kv // KEYS_OF_A_ROUND)))
        return tile, columns, splits if blocks <= COUNTERS else 1

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
        splits: int | None = None,
    ) -> None:
        """Attend for `requests` requests from `first_request` on, into their rows of `out`.

        out: [T, heads * v_dim]. max_q and max_kv bound the lengths, which the kernel reads from the
        device. `splits` overrides the plan.
        """
        heads = self.heads
        if bool(softcap) != heads.softcap:
            raise KernelError(
                f"paged_decode was built with softcap {heads.softcap}, called with {softcap}"
            )
        tile, columns, planned = self.grid(requests, max_q, max_kv)
        splits = planned if splits is None else splits
        partial = stats = 0
        if splits > 1:
            slots = requests * columns * splits * tile
            workspace = torch.empty(slots * (heads.v_dim + 2), dtype=torch.float32, device=q.device)
            partial = workspace.data_ptr()
            stats = partial + slots * heads.v_dim * 4
        self._launch[tile](
            (columns, splits, requests),
            (WARPS * 32, 1, 1),
            out.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_tables.data_ptr(),
            cu_query_lens.data_ptr(),
            kv_lens.data_ptr(),
            pointer(sinks),
            partial,
            stats,
            self._counters.data_ptr(),
            q.stride(0),
            block_tables.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
            heads.num_kv_heads,
            first_request,
            window or 0,
            scale,
            softcap or 0.0,
        )
