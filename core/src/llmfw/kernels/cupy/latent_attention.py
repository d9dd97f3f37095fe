"""Launcher of latent_attention.cu: attention over a latent cache that all heads share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.attention import Part, parts_of
from llmfw.kernels.cupy.compile import device_index, load
from llmfw.kernels.cupy.latent_merge import Division, LatentHeads, Splits
from llmfw.kernels.cupy.launch import Launcher, dense
from llmfw.kernels.cupy.paged_decode import UNSETTLED, check_block_size
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

WARPS = 8
MAX_SPLITS = 64
SHARE = 256  # keys that a block walks at least where there are many requests: combining costs 4 us
LONG_SHARE = 1024  # the same where the requests alone fill the device
LONG_WAVES = 2  # of blocks, so that such requests are split at all
RESERVED_BYTES = 1 << 10  # of shared memory, for each resident block
LEAST_SHARED_BYTES = 99 << 10  # that a block can have everywhere, where torch does not tell more


@dataclass(frozen=True)
class Tile:
    """What a block holds at once.

    Args:
        rows: Query rows: heads times tokens.
        keys: Of one tile.
        stages: Tiles in shared memory, all but one of them on their way.
    """

    rows: int
    keys: int
    stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of a block, as latent_attention.cu divides it."""
        row_tiles = self.rows // 16
        key_parts = min(self.keys // 16, max(WARPS // row_tiles // 2, 1))
        dim_parts = WARPS // (row_tiles * key_parts)
        tiles = self.stages * self.keys * (head_dim + 8) * 2
        scores = dim_parts * self.rows * (self.keys + 8) * 4
        return tiles + scores + self.rows * (self.keys + 8) * 2 + self.rows * 4


# The best first; the others are for devices with less shared memory.
TILES = {16: (Tile(16, 32, 2), Tile(16, 16, 2)), 64: (Tile(64, 32, 2), Tile(64, 16, 2))}
WIDE = Tile(16, 64, 2)  # one block of a multiprocessor: quicker where there are about as many


def supports(context: OpContext) -> str | None:
    """Latents and keys of whole mma tiles, blocks of whole groups of 8 keys."""
    if not context.shape.get("latent"):
        return "serves latent caches only"
    heads = LatentHeads.of(context)
    if context["num_kv_heads"] != 1:
        return f"{context['num_kv_heads']} KV heads, a latent cache has one"
    if heads.head_dim % 16 or heads.v_dim % 16 or heads.head_dim > 576 or heads.v_dim > 512:
        return f"sizes {heads.head_dim} and {heads.v_dim} are not multiples of 16 up to 576 and 512"
    if heads.block_size % 8:
        return f"block size {heads.block_size} is not a multiple of 8"
    for name in ("window", "softcap", "sinks"):
        if context.shape.get(name):
            return f"serves no {name}"
    return None


@dataclass(frozen=True)
class Plan:
    """How one launch is divided.

    Args:
        tile: What a block holds.
        columns: Row tiles of a request.
        splits: Most parts that a request's keys are divided into.
        least_share: Fewest tiles of keys that a part has.
    """

    tile: Tile
    columns: int
    splits: int
    least_share: int

    @property
    def division(self) -> Division:
        """What the merge of splits wants to know."""
        tile = self.tile
        return Division(tile.rows, tile.keys, self.columns, self.splits, self.least_share)


class LatentAttention:
    """The compiled kernels for one head layout."""

    def __init__(self, context: OpContext) -> None:
        self.heads = LatentHeads.of(context)
        self._context = context
        properties: Any = torch.cuda.get_device_properties(device_index(context.info.device))
        self._sms: int = properties.multi_processor_count
        self._shared_limit: int = getattr(
            properties, "shared_memory_per_block_optin", LEAST_SHARED_BYTES
        )
        self._launchers: dict[Tile, Launcher] = {}
        self._splits = Splits(context, self.heads)

    def resident_blocks(self, tile: Tile) -> int:
        """Blocks of one multiprocessor at once: two where registers and shared memory allow."""
        both = 2 * (tile.shared_bytes(self.heads.head_dim) + RESERVED_BYTES)
        return 2 if tile.rows == 16 and both <= self._shared_limit + RESERVED_BYTES else 1

    def tile(self, rows: int, requests: int = 1) -> Tile:
        """The tile for so many requests of so many rows each.

        Raises:
            KernelError: If the device has too little shared memory for any.
        """
        tiles: tuple[Tile, ...] = TILES[16 if rows <= 16 else 64]
        if rows <= 16 and not self._few(requests) and requests <= self._sms:
            tiles = (WIDE, *tiles)
        for tile in tiles:
            if tile.shared_bytes(self.heads.head_dim) <= self._shared_limit:
                return tile
        raise KernelError(f"{self._shared_limit} bytes of shared memory are too few")

    def _few(self, blocks: int) -> bool:
        """Whether blocks leave so much of the device idle that every tile may have its own."""
        return blocks <= max(1, self._sms // 4)

    def plan(
        self,
        requests: int,
        max_q: int,
        max_kv: int,
        splits: int | None = None,
        tile: Tile | None = None,
    ) -> Plan:
        """How a batch of at most these lengths is launched; `splits` and `tile` override."""
        rows = self.heads.num_heads * max_q
        tile = tile or self.tile(rows, requests)
        columns = -(-rows // tile.rows)
        if splits is not None:
            return Plan(tile, columns, splits, 1)
        slots, blocks = self._sms * self.resident_blocks(tile), columns * requests
        if blocks <= slots // 2:
            share = 1 if self._few(blocks) else SHARE // tile.keys
            splits = min(slots // blocks, -(-max_kv // (share * tile.keys)), MAX_SPLITS)
            return Plan(tile, columns, splits, share)
        splits = min(-(-LONG_WAVES * slots // blocks), -(-max_kv // LONG_SHARE), MAX_SPLITS)
        return Plan(tile, columns, splits, LONG_SHARE // tile.keys)

    def launcher(self, tile: Tile) -> Launcher:
        """The kernel for blocks of such tiles, compiled when wanted."""
        found = self._launchers.get(tile)
        if found is None:
            heads, context = self.heads, self._context
            module = load(
                "latent_attention.cu",
                context.info.device,
                context.dtype,
                HEAD_DIM=heads.head_dim,
                V_DIM=heads.v_dim,
                HEADS=heads.num_heads,
                BLOCK_SIZE=heads.block_size,
                ROWS=tile.rows,
                KEYS=tile.keys,
                STAGES=tile.stages,
                MIN_BLOCKS=self.resident_blocks(tile),
            )
            size = tile.shared_bytes(heads.head_dim)
            found = module.launcher("latent_attention", "PPPPPPPPqqqiiif", size)
            self._launchers[tile] = found
        return found

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        cu_query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        part: Part,
        scale: float,
        *,
        splits: int | None = None,
        tile: Tile | None = None,
    ) -> None:
        """Attend for the requests of `part` into their rows of out [T, heads * v_dim].

        The part's greatest lengths bound those that the kernel reads from the device. `splits` and
        `tile` override the plan.
        """
        heads = self.heads
        plan = self.plan(part.requests, part.max_q, part.max_kv, splits, tile)
        room = self._splits.room(part.requests, plan.division, q.device)
        self.launcher(plan.tile)(
            (plan.columns, plan.splits, part.requests),
            (WARPS * 32, 1, 1),
            out.data_ptr(),
            q.data_ptr(),
            cache.data_ptr(),
            block_tables.data_ptr(),
            cu_query_lens.data_ptr(),
            kv_lens.data_ptr(),
            *self._splits.addresses(room, part.requests, plan.division),
            block_tables.stride(0),
            cache.stride(0),
            cache.stride(1),
            part.first,
            plan.least_share,
            heads.block_size if part.settled else UNSETTLED,
            scale,
        )
        self._splits.merge(out, room, cu_query_lens, kv_lens, part, plan.division)


def latent_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` over a latent cache, for one head layout."""
    attend = LatentAttention(context)
    return attention_by(attend.heads, lambda cache: attend)


def attention_by(
    heads: LatentHeads, kernel_for: Callable[[torch.Tensor], Callable[..., None]]
) -> Callable[..., torch.Tensor]:
    """The op by the kernel that `kernel_for` names for a cache."""

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
        if window or softcap or sinks is not None:
            raise KernelError(
                "latent attention serves no window, cap or sinks",
                hint="leave them out, or give the layer an ordinary cache",
            )
        q = dense(q)
        width = heads.num_heads * heads.v_dim
        out = torch.empty((q.shape[0], width), dtype=q.dtype, device=q.device)
        lengths = view.block_tables, metadata.cu_query_lens, metadata.kv_lens_device
        kernel = kernel_for(k_cache)
        for part in parts_of(metadata):
            kernel(out, q, k_cache, *lengths, part, scale)
        return out

    return call
