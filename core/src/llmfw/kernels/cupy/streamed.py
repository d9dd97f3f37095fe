"""Variants of streamed.cu: products of up to 64 rows whose weight streams through shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import load, multiprocessors
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.products import NO_NORM, STREAMED_ROWS, NormArguments, NormedProduct, Role
from llmfw.kernels.cupy.tensor_map import tensor_map
from llmfw.ops.kernel import DeviceInfo, OpContext

CHUNK, SMALL_CHUNK = 256, 128  # values of each row of a stage
SMALL_TILE, FEW_ROWS = 64, 32  # up to which stages are of the larger chunks
SHARED_BYTES = 226 << 10  # of a block, which has a multiprocessor for itself
MOST_STAGES = 16
LEAST_BLOCKS = 48  # fewer cannot ask for as much as memory gives
PARTS_MULTIPLE = 4  # sums of squares are read four at a time
MOST_SPLIT = 132  # blocks that have one tile each run at the same time
CUTS = ((64, 1), (128, 1), (64, 2), (64, 4))  # rows of a tile, blocks that share the sums


@dataclass(frozen=True)
class Streamed:
    """streamed.cu with its constants.

    Args:
        tile: Rows of the weight that a block multiplies at once: a multiple of 64.
        split: Blocks of a cluster that share the summed dimension.
        gated: Whether silu(gate) * up ends the product.
        role: What it does for a norm beside it.
    """

    tile: int
    split: int
    gated: bool = False
    role: Role = Role.PLAIN
    source: str = "streamed.cu"

    @property
    def name(self) -> str:
        """For messages and results."""
        return f"{'gated' if self.gated else 'streamed'}_n{self.tile}_k{self.split}"

    @property
    def warps(self) -> int:
        """That multiply; one more brings the tiles."""
        return self.tile // 16

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants; all shapes share most of them."""
        return {
            "ROWS": bucket,
            "GATED": int(self.gated),
            "WARPS": self.warps,
            "CHUNK": self.chunk(bucket),
            "STAGES": self.stages(bucket, context["in_features"]),
            "SPLIT": self.split,
            **self.role.constants,
        }

    def chunk(self, bucket: int) -> int:
        """Values of each row of a stage: many where a few stages of them fit."""
        large = self.tile <= SMALL_TILE and bucket <= FEW_ROWS
        return CHUNK if large else SMALL_CHUNK

    def stages(self, bucket: int, in_features: int) -> int:
        """Chunks of each row under way: what memory holds; with a split no more than there are."""
        room = SHARED_BYTES - self._rest(bucket)
        found = min(MOST_STAGES, room // self._stage_bytes(bucket))
        if self.split == 1:
            return found
        chunks = -(-in_features // self.chunk(bucket))
        return max(1, min(found, -(-chunks // self.split)))

    def shared_bytes(self, bucket: int, in_features: int) -> int:
        """Of a block."""
        stages = self.stages(bucket, in_features) * self._stage_bytes(bucket)
        return stages + self._rest(bucket)

    def _stage_bytes(self, bucket: int) -> int:
        return (self.tile + bucket) * self.chunk(bucket) * 2

    def _rest(self, bucket: int) -> int:
        """Sums of all blocks of the cluster, rows' scales and barriers."""
        sums = self.split * bucket * (self.tile // self.split + 4) * 4
        scales = bucket * 4 if self.role is Role.NORMED else 8
        return sums + scales + (2 * MOST_STAGES + 3) * 8

    def fits(self, in_features: int, weight_rows: int) -> bool:
        """Whether it makes sense: enough blocks, and those of a split all at the same time."""
        blocks = -(-weight_rows // self.tile) * self.split
        if self.split > 1 and (blocks > MOST_SPLIT or in_features < CHUNK * self.split):
            return False
        return blocks >= LEAST_BLOCKS

    def parts(self, outputs: int) -> int:
        """Parts of the squares that it writes: one for each block, and zeros up to a multiple."""
        written = -(-outputs // self.tile) * self.split
        return -(-written // PARTS_MULTIPLE) * PARTS_MULTIPLE

    def build(self, bucket: int, context: OpContext, outputs: int) -> NormedProduct:
        """Compile; the result is called with (x, weight, bias, out, rows) and what its role needs.

        It serves up to `bucket` rows.
        """
        in_features, dtype, device = context["in_features"], context.dtype, context.info.device
        shared = self.shared_bytes(bucket, in_features)
        module = load(self.source, device, dtype, **self.constants(bucket, context))
        launch = module.launcher("streamed", "PTTPiiiPPPif", shared, self.split)
        weight_rows = outputs * (1 + self.gated)
        tiles = -(-weight_rows // self.tile)
        sms = multiprocessors(device)
        walkers = tiles if self.split > 1 else min(tiles, sms)
        scalers = 0 if self.role is not Role.NORMED else 1 + (bucket > 32)
        grid, block = (walkers * self.split, 1, 1), ((self.warps + 1 + scalers) * 32, 1, 1)
        box = self.tile // (1 + self.gated)

        def run(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            out: torch.Tensor,
            rows: int,
            norm: NormArguments = NO_NORM,
        ) -> None:
            launch(
                grid,
                block,
                out.data_ptr(),
                tensor_map(x.data_ptr(), rows, in_features, dtype, bucket),
                tensor_map(weight.data_ptr(), weight_rows, in_features, dtype, box),
                pointer(bias),
                in_features,
                outputs,
                rows,
                *norm,
            )

        return run


def streamed_variants(bucket: int, context: OpContext, weight_rows: int) -> tuple[Streamed, ...]:
    """What may serve up to `bucket` rows of x: the cuts that make sense for the shape."""
    if bucket not in STREAMED_ROWS or not servable(context):
        return ()
    gated = "intermediate_size" in context.shape
    cuts = (Streamed(*cut, gated=gated) for cut in CUTS)
    return tuple(cut for cut in cuts if cut.fits(context["in_features"], weight_rows))


def servable(context: OpContext) -> bool:
    """Whether any cut serves: 16-bit values, rows of whole packs, tensor cores of 9.0."""
    halves = context.dtype in (torch.bfloat16, torch.float16)
    return halves and context["in_features"] % 8 == 0 and has_tile_products(context.info)


def has_tile_products(info: DeviceInfo) -> bool:
    """Whether the device has the instructions that compute capability 9.0 alone has."""
    levels = [int(name[3:]) for name in info.features if name.startswith("sm_")]
    return max(levels, default=0) == 90
