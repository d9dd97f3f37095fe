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
GROUPS = 2  # warpgroups that multiply
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
    """

    tile: int
    share: int = 1
    split: int = 1
    gated: bool = False
    source: str = "tiled.cu"

    @property
    def name(self) -> str:
        """For messages and results."""
        kind = "gated" if self.gated else "tiled"
        return f"{kind}_n{self.tile}_s{self.share}_k{self.split}"

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
        return max(1, usable // self.cluster)

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants; all shapes share most of them."""
        outputs = context["intermediate_size" if self.gated else "out_features"]
        return {
            "ROWS": bucket,
            "GATED": int(self.gated),
            "GROUPS": GROUPS,
            "TILE": self.tile,
            "SHARE": self.share,
            "SPLIT": self.split,
            "STAGES": self.stages(bucket).weight,
            "X_STAGES": self.stages(bucket).x,
            "BIAS": context.shape.get("bias", 1),
            "PACKED": int(outputs % 8 == 0),
        }

    def stages(self, bucket: int) -> Stages:
        """What memory holds: LEAST_X of x, which L2 has, much of the weight, then more of x."""
        room = (SHARED_BYTES - self._barrier_bytes) // ROW_BYTES
        weight = min(MOST_STAGES, (room - LEAST_X * bucket) // self.tile)
        return Stages(weight, min(weight, (room - weight * self.tile) // bucket))

    def shared_bytes(self, bucket: int) -> int:
        """Of a block: the stages, in whose place sums of a split lie later, and barriers."""
        stages = self.stages(bucket)
        staged = (stages.weight * self.tile + stages.x * bucket) * ROW_BYTES
        step = 8 * self.split * (1 + self.gated)
        sums = -(-self.tile // step) * step * bucket * 4 if self.split > 1 else 0
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
        grid, block = (clusters * self.cluster, 1, 1), (GROUPS * 128, 1, 1)
        weight_box, x_box = self.tile // (1 + self.gated), bucket // self.share

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
