"""Variants of tiled.cu: products of 65 to 256 rows by tiles that fill the multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmfw.kernels.cupy.compile import load, multiprocessors
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.products import Product
from llmfw.kernels.cupy.tensor_map import tensor_map
from llmfw.ops.kernel import OpContext

CHUNK = 64  # values of each row of a stage
GROUPS = 2  # most warpgroups that multiply
GROUP_ROWS = 64  # of x, that a warpgroup multiplies at once
SHARED_BYTES = 226 << 10  # of a block, which has a multiprocessor for itself
ROW_BYTES = CHUNK * 2  # of a stage
LEAST_X = 3  # chunks of x under way: L2 takes more than one chunk's time
MOST_STAGES = 8  # chunks of the weight under way
USABLE = 10 / 11  # part of the multiprocessors that clusters of 4 and 8 can have: 120 of 132


class Stages(NamedTuple):
    """Chunks of the weight and of x under way."""

    weight: int
    x: int


@dataclass(frozen=True)
class Tiled:
    """tiled.cu with its constants; `share` x `split` blocks are a cluster.

    Args:
        tile: Rows of the weight that a block multiplies at once: a multiple of 8, of 16 if `gated`.
        share: Blocks with neighbouring tiles, which share x.
        split: Blocks that share the summed dimension.
        gated: Whether silu(gate) * up ends the product.
        parts: Blocks that divide the rows of x, each with the whole tile.
    """

    tile: int
    share: int = 1
    split: int = 1
    gated: bool = False
    parts: int = 1
    source: str = "tiled.cu"

    @property
    def name(self) -> str:
        """For messages and results."""
        kind = "gated" if self.gated else "tiled"
        return f"{kind}_n{self.tile}_s{self.share}_k{self.split}_p{self.parts}"

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.share * self.split

    def clusters(self, weight_rows: int) -> int:
        """That do the work, if all of it were done in one round."""
        return -(-weight_rows // (self.tile * self.share))

    def at_once(self, sms: int) -> int:
        """Clusters that run at the same time: those of more than two do not fit everywhere."""
        usable = sms if self.cluster <= 2 else int(sms * USABLE)
        return max(1, usable // (self.cluster * self.parts))

    def block_rows(self, bucket: int) -> int:
        """Rows of x that a block multiplies."""
        return bucket // self.parts

    def groups(self, bucket: int) -> int:
        """Warpgroups that divide them."""
        return min(GROUPS, self.block_rows(bucket) // GROUP_ROWS)

    def has_bringer(self, bucket: int) -> bool:
        """Whether a warp of its own asks for tiles: one 64 of rows a group leaves registers."""
        return self.block_rows(bucket) == self.groups(bucket) * GROUP_ROWS

    def threads(self, bucket: int) -> int:
        """Of a block."""
        return self.groups(bucket) * 128 + 32 * self.has_bringer(bucket)

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants; all shapes share most of them."""
        outputs = context["intermediate_size" if self.gated else "out_features"]
        return {
            "ROWS": self.block_rows(bucket),
            "GATED": int(self.gated),
            "GROUPS": self.groups(bucket),
            "TILE": self.tile,
            "SHARE": self.share,
            "SPLIT": self.split,
            "PARTS": self.parts,
            "STAGES": self.stages(bucket).weight,
            "X_STAGES": self.stages(bucket).x,
            "BIAS": context.shape.get("bias", 1),
            "PACKED": int(outputs % 8 == 0),
        }

    def stages(self, bucket: int) -> Stages:
        """What memory holds: LEAST_X of x, which L2 has, much of the weight, then more of x."""
        room, rows = (SHARED_BYTES - self._barrier_bytes) // ROW_BYTES, self.block_rows(bucket)
        weight = min(MOST_STAGES, (room - LEAST_X * rows) // self.tile)
        return Stages(weight, min(weight, (room - weight * self.tile) // rows))

    def shared_bytes(self, bucket: int) -> int:
        """Of a block: the stages, in whose place sums of a split lie later, and barriers."""
        stages, rows = self.stages(bucket), self.block_rows(bucket)
        staged = (stages.weight * self.tile + stages.x * rows) * ROW_BYTES
        step = 8 * self.split * (1 + self.gated)
        sums = -(-self.tile // step) * step * rows * 4 if self.split > 1 else 0
        return max(staged, sums) + self._barrier_bytes

    @property
    def _barrier_bytes(self) -> int:
        return (4 * MOST_STAGES + 2) * 8

    def build(self, bucket: int, context: OpContext, outputs: int) -> Product:
        """Compile; the result is called with (x, weight, bias, out, rows)."""
        in_features, dtype, device = context["in_features"], context.dtype, context.info.device
        module = load(self.source, device, dtype, **self.constants(bucket, context))
        launch = module.launcher("tiled", "PTTPiii", self.shared_bytes(bucket), self.cluster)
        weight_rows = outputs * (1 + self.gated)
        sms = multiprocessors(device)
        clusters = self.clusters(weight_rows)
        if self.split == 1:  # a cluster walks over tiles, all over as many
            clusters = -(-clusters // -(-clusters // self.at_once(sms)))
        grid = (clusters * self.cluster * self.parts, 1, 1)
        block = (self.threads(bucket), 1, 1)
        weight_box, x_box = self.tile // (1 + self.gated), self.block_rows(bucket) // self.share

        def run(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            out: torch.Tensor,
            rows: int,
        ) -> None:
            launch(
                grid,
                block,
                out.data_ptr(),
                tensor_map(x.data_ptr(), rows, in_features, dtype, x_box),
                tensor_map(weight.data_ptr(), weight_rows, in_features, dtype, weight_box),
                pointer(bias),
                in_features,
                outputs,
                rows,
            )

        return run
