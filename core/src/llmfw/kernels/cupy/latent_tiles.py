"""Launcher of latent_tiles.cu: attention over a latent cache on compute capability 9.0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmfw.kernels.cupy import latent_attention
from llmfw.kernels.cupy.attention import Part
from llmfw.kernels.cupy.compile import load, multiprocessors
from llmfw.kernels.cupy.latent_attention import LatentAttention, attention_by
from llmfw.kernels.cupy.latent_merge import Division, LatentHeads, Splits
from llmfw.kernels.cupy.launch import Launcher
from llmfw.kernels.cupy.paged_decode import UNSETTLED
from llmfw.kernels.cupy.tensor_map import SPAN, tensor_map
from llmfw.ops.kernel import OpContext

KEYS = 64  # of a tile, what four warps multiply at least
GROUP = 8  # keys that one copy brings
SHARED_BYTES = 227 << 10  # of a block, which has a multiprocessor for itself
MOST_STAGES = 4
HANDOVER_ROWS = 64  # from which on a whole warpgroup brings tiles, to give its registers away
TRIPLE_PART = 7 / 8  # of the multiprocessors: what clusters of three find room on
MOST_GROUPS = 64
LONG_WAVES = 2  # of blocks, so that long requests are split although they alone fill the device
LONG_KEYS = 1024  # of a block there, at least


@dataclass(frozen=True)
class Cut:
    """What a cluster of blocks does.

    Args:
        rows: Query rows of a block, heads times tokens: 16, 32 or 64.
        cluster: Blocks that join their sums in shared memory.
    """

    rows: int
    cluster: int = 1

    @property
    def warpgroups(self) -> int:
        """That multiply; two divide the rows for scores and the latent for values."""
        return 2 if self.rows == HANDOVER_ROWS else 1

    @property
    def threads(self) -> int:
        """Of a block: those that multiply, and those that bring tiles, as latent_tiles.cu says."""
        return self.warpgroups * 128 + (128 if self.rows == HANDOVER_ROWS else 32)

    def stages(self, head_dim: int) -> int:
        """Tiles under way: what memory holds."""
        return min(MOST_STAGES, (SHARED_BYTES - self._rest(head_dim)) // _tile_bytes(head_dim))

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of a block, as latent_tiles.cu divides it."""
        return self.stages(head_dim) * _tile_bytes(head_dim) + self._rest(head_dim)

    def _rest(self, head_dim: int) -> int:
        """Queries, weights, maxima by warp, fades and statistics, barriers."""
        return self.rows * (head_dim * 2 + KEYS * 2 + 7 * 4) + (2 * MOST_STAGES + 1) * 8


def _tile_bytes(head_dim: int) -> int:
    return KEYS * head_dim * 2


@dataclass(frozen=True)
class Plan:
    """How one launch is divided.

    Args:
        cut: What a cluster does.
        columns: Blocks of rows that a request has.
        groups: Most clusters that share a request's keys.
        least_share: Fewest tiles of keys that a cluster has.
    """

    cut: Cut
    columns: int
    groups: int
    least_share: int

    @property
    def division(self) -> Division:
        """What the merge of groups wants to know."""
        return Division(self.cut.rows, KEYS, self.columns, self.groups, self.least_share)


def supports(context: OpContext) -> str | None:
    """What latent_attention.cu serves, in latents and keys of whole boxes of a tensor copy."""
    reason = latent_attention.supports(context)
    if reason is not None:
        return reason
    heads = LatentHeads.of(context)
    if heads.head_dim % SPAN or heads.v_dim % (2 * SPAN):
        return f"sizes {heads.head_dim} and {heads.v_dim} are no multiples of {SPAN} and {2 * SPAN}"
    return None


class LatentTiles:
    """The compiled kernels for one head layout."""

    def __init__(self, context: OpContext) -> None:
        self.heads = LatentHeads.of(context)
        self._context = context
        self._sms = multiprocessors(context.info.device)
        self._launchers: dict[Cut, Launcher] = {}
        self._splits = Splits(context, self.heads)

    def plan(
        self,
        requests: int,
        max_q: int,
        max_kv: int,
        cut: Cut | None = None,
        groups: int | None = None,
    ) -> Plan:
        """How a batch of at most these lengths is launched; `cut` and `groups` override.

        Splits fill the device once. Two or three parts of a request are joined within a cluster;
        larger clusters leave multiprocessors idle, so that more parts go through memory.
        """
        needed, tiles = self.heads.num_heads * max_q, -(-max_kv // KEYS)
        rows = self._rows(needed, requests, tiles) if cut is None else cut.rows
        columns = -(-needed // rows)
        blocks = columns * requests
        room = self._sms // blocks
        if cut is None:
            cut = Cut(rows, self._cluster(rows, blocks, tiles))
        if groups is not None:
            return Plan(cut, columns, groups, 1)
        if cut.cluster > 1:
            return Plan(cut, columns, 1, 1)
        if room > 1:
            return Plan(cut, columns, min(room, tiles, MOST_GROUPS), 1)
        share = LONG_KEYS // KEYS
        waves = -(-LONG_WAVES * self._sms // blocks)
        return Plan(cut, columns, min(waves, -(-tiles // share), MOST_GROUPS), share)

    def _rows(self, needed: int, requests: int, tiles: int) -> int:
        """Few where the device has a multiprocessor for each tile, or for two blocks of each."""
        if needed <= 16 or -(-needed // 16) * requests * tiles <= self._sms:
            return 16
        return 32 if needed <= 32 or -(-needed // 32) * requests * 2 <= self._sms else 64

    def _cluster(self, rows: int, blocks: int, tiles: int) -> int:
        """Two or three where no more parts find room, else one.

        Three leave some multiprocessors idle, which only those who wait for memory do not mind.
        """
        room, waits = self._sms // blocks, rows == 16
        if waits and room in (3, 4) and tiles > 2 and blocks * 3 <= self._sms * TRIPLE_PART:
            return 3
        return 2 if 2 <= room <= (4 if waits else 2) and tiles > 1 else 1

    def launcher(self, cut: Cut) -> Launcher:
        """The kernel for such a cut, compiled when wanted."""
        found = self._launchers.get(cut)
        if found is None:
            heads, context = self.heads, self._context
            module = load(
                "latent_tiles.cu",
                context.info.device,
                context.dtype,
                HEAD_DIM=heads.head_dim,
                V_DIM=heads.v_dim,
                HEADS=heads.num_heads,
                BLOCK_SIZE=heads.block_size,
                ROWS=cut.rows,
                WARPGROUPS=cut.warpgroups,
                STAGES=cut.stages(heads.head_dim),
                CLUSTER=cut.cluster,
            )
            size = cut.shared_bytes(heads.head_dim)
            found = module.launcher("latent_tiles", "PTTPPPPPqiiiif", size, cut.cluster)
            self._launchers[cut] = found
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
        cut: Cut | None = None,
        groups: int | None = None,
    ) -> None:
        """Attend for the requests of `part` into their rows of out [T, heads * v_dim].

        The part's greatest lengths bound those that the kernel reads from the device. `cut` and
        `groups` override the plan.
        """
        heads = self.heads
        plan = self.plan(part.requests, part.max_q, part.max_kv, cut, groups)
        room = self._splits.room(part.requests, plan.division, q.device)
        dim, slots = heads.head_dim, cache.shape[0] * heads.block_size
        self.launcher(plan.cut)(
            (plan.groups * plan.cut.cluster, plan.columns, part.requests),
            (plan.cut.threads, 1, 1),
            out.data_ptr(),
            tensor_map(q.data_ptr(), q.shape[0] * heads.num_heads, dim, q.dtype, plan.cut.rows),
            tensor_map(cache.data_ptr(), slots, dim, q.dtype, GROUP, whole=True),
            block_tables.data_ptr(),
            cu_query_lens.data_ptr(),
            kv_lens.data_ptr(),
            *self._splits.addresses(room, part.requests, plan.division),
            block_tables.stride(0),
            block_tables.shape[1],
            part.first,
            plan.least_share,
            heads.block_size if part.settled else UNSETTLED,
            scale,
        )
        self._splits.merge(out, room, cu_query_lens, kv_lens, part, plan.division)


def latent_tiles(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` over a latent cache, for one head layout.

    A cache that does not lie in one piece is left to latent_attention.cu.
    """
    tiles, others = LatentTiles(context), LatentAttention(context)
    return attention_by(tiles.heads, lambda cache: tiles if cache.is_contiguous() else others)
