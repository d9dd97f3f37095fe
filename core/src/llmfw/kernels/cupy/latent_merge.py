"""What both kernels of latent attention share: the heads' shape, and the merge of splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.attention import Part
from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher
from llmfw.ops.kernel import OpContext


@dataclass(frozen=True)
class LatentHeads:
    """The static shape of one kind of latent attention layer."""

    num_heads: int
    head_dim: int
    v_dim: int
    block_size: int

    @classmethod
    def of(cls, context: OpContext) -> LatentHeads:
        """From the op's context."""
        return cls(
            context["num_heads"],
            context["head_dim"],
            context["v_head_dim"],
            context["block_size"],
        )


@dataclass(frozen=True)
class Division:
    """How a launch divides its requests.

    Args:
        rows: Query rows of a block.
        keys: Of a tile.
        columns: Blocks of rows that a request has.
        splits: Most parts that a request's keys are divided into.
        least_share: Fewest tiles of keys that a part has.
    """

    rows: int
    keys: int
    columns: int
    splits: int
    least_share: int


class Splits:
    """Unfinished outputs of the splits of a launch, in memory, and the kernel that adds them up."""

    def __init__(self, context: OpContext, heads: LatentHeads) -> None:
        self._context = context
        self._heads = heads
        self._launchers: dict[tuple[int, int], Launcher] = {}

    def room(self, requests: int, division: Division, device: torch.device) -> torch.Tensor | None:
        """Float32 for outputs, then for maxima and sums; None where nothing is split."""
        if division.splits == 1:
            return None
        values = self._rows(requests, division) * (self._heads.v_dim + 2)
        return torch.empty(values, dtype=torch.float32, device=device)

    def addresses(
        self, room: torch.Tensor | None, requests: int, division: Division
    ) -> tuple[int, int]:
        """Where outputs lie, and maxima and sums."""
        if room is None:
            return 0, 0
        outputs = self._rows(requests, division) * self._heads.v_dim
        return room.data_ptr(), room.data_ptr() + outputs * 4

    def merge(
        self,
        out: torch.Tensor,
        room: torch.Tensor | None,
        cu_query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        part: Part,
        division: Division,
    ) -> None:
        """Add up what the blocks left, if anything, into `out`."""
        if room is None:
            return
        heads = self._heads
        self._launcher(division.rows, division.keys)(
            (heads.num_heads * part.max_q, part.requests, 1),
            (-(-heads.v_dim // 128) * 32, 1, 1),
            out.data_ptr(),
            cu_query_lens.data_ptr(),
            kv_lens.data_ptr(),
            *self.addresses(room, part.requests, division),
            part.first,
            division.columns,
            division.splits,
            division.least_share,
        )

    def _rows(self, requests: int, division: Division) -> int:
        return requests * division.columns * division.splits * division.rows

    def _launcher(self, rows: int, keys: int) -> Launcher:
        found = self._launchers.get((rows, keys))
        if found is None:
            context, heads = self._context, self._heads
            module = load(
                "merge_latent.cu",
                context.info.device,
                context.dtype,
                V_DIM=heads.v_dim,
                HEADS=heads.num_heads,
                ROWS=rows,
                KEYS=keys,
            )
            found = module.launcher("merge_latent", "PPPPPiiii")
            self._launchers[rows, keys] = found
        return found
