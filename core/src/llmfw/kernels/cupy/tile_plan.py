"""Which cuts of tiled.cu are worth measuring for a shape: those with the least estimated time.

A block takes its tensor cores' time or its shared memory's, whichever is more, for each chunk of
the summed dimension; all blocks together take what they read from L2, and the weight what it takes
from memory. Blocks run in rounds, so a cut is good when its last round is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llmfw.kernels.cupy.compile import multiprocessors
from llmfw.kernels.cupy.products import TILED_ROWS
from llmfw.kernels.cupy.streamed import servable
from llmfw.kernels.cupy.tiled import CHUNK, GROUPS, SHARED_BYTES, Tiled
from llmfw.ops.kernel import OpContext

CLOCK = 1.6e9  # cycles a second under load
READ, READ_L2 = 3.12e12, 8.5e12  # bytes a second, of all multiprocessors
PRODUCTS = 2048  # multiplications and additions of a multiprocessor's tensor cores a cycle
SHARED = 128  # bytes of its shared memory a cycle
SENT = 32  # bytes from one's shared memory to another's a cycle
MEETING = 1e-6  # seconds until blocks that split a sum have met
START = 1.5e-6  # seconds until the first chunk is there
KINDS = ((2, 1), (1, 4))  # blocks that share x and the summed dimension, as won somewhere
LEAST_TILE, MOST_TILE = 32, 256  # columns of one instruction
MOST_SUMS = 224  # of a thread, in registers
MEASURED = 2  # cuts
LONG = 2  # times as many inputs as outputs: so long sums won,
LONG_ROWS, LONGER = 128, 8192  # up to so many rows; beyond, with so many inputs
ALIKE = 32  # rows of a tile below which cuts of one kind take about as long


@dataclass(frozen=True)
class Product:
    """A product's size; `weight_rows` counts gates and ups."""

    rows: int
    in_features: int
    weight_rows: int
    gated: bool = False


def tiled_variants(bucket: int, context: OpContext, weight_rows: int) -> tuple[Tiled, ...]:
    """The few that may serve up to `bucket` rows of x best."""
    if bucket not in TILED_ROWS or not servable(context):
        return ()
    gated = "intermediate_size" in context.shape
    product = Product(bucket, context["in_features"], weight_rows, gated)
    if not is_promising(product):
        return ()
    return best_cuts(product, multiprocessors(context.info.device), MEASURED)


def is_promising(product: Product) -> bool:
    """Whether a cut won for such a product anywhere; a start measures nothing for the others."""
    is_long = product.in_features >= LONG * product.weight_rows
    pays = product.rows <= LONG_ROWS or product.in_features >= LONGER
    return product.gated or (is_long and pays)


def best_cuts(product: Product, sms: int, count: int) -> tuple[Tiled, ...]:
    """The `count` cuts with the least estimated time, none much like a better one."""
    times = {cut: estimate(cut, product, sms) for cut in cuts(product)}
    possible = {cut: time for cut, time in times.items() if time is not None}
    best: list[Tiled] = []
    for cut in sorted(possible, key=possible.__getitem__):
        if len(best) < count and not any(alike(cut, other) for other in best):
            best.append(cut)
    return tuple(best)


def alike(cut: Tiled, other: Tiled) -> bool:
    """Whether two cuts differ in little but the estimate."""
    kinds = ((each.share, each.split) for each in (cut, other))
    return len(set(kinds)) == 1 and abs(cut.tile - other.tile) < ALIKE


def cuts(product: Product) -> Iterator[Tiled]:
    """All that a block's registers and memory allow, in whole groups of 8 results."""
    each = product.rows // 64 // GROUPS  # 64s of rows of a warpgroup
    for share, split in KINDS:
        step = 8 * (1 + product.gated)
        for tile in range(max(step, LEAST_TILE), 1 + min(MOST_TILE, 2 * MOST_SUMS // each), step):
            cut = Tiled(tile, share, split, product.gated)
            if cut.shared_bytes(product.rows) <= SHARED_BYTES:
                yield cut


def estimate(cut: Tiled, product: Product, sms: int) -> float | None:
    """Seconds; None where blocks of a split would not all run at the same time."""
    clusters, at_once = cut.clusters(product.weight_rows), cut.at_once(sms)
    chunks = -(-product.in_features // CHUNK)
    if cut.split > 1 and (clusters > at_once or chunks < cut.split):
        return None
    rounds, chunks = -(-clusters // at_once), -(-chunks // cut.split)
    rows = product.rows
    multiplied = rows * cut.tile * CHUNK / PRODUCTS
    read = rows // 64 * (64 + cut.tile) * CHUNK * 2
    written = (rows + cut.tile) * CHUNK * 2
    block = rounds * chunks * max(multiplied, (read + written) / SHARED) / CLOCK
    fetched = (cut.tile + rows / cut.share) * CHUNK * 2
    l2 = clusters * cut.cluster * chunks * fetched / READ_L2
    memory = product.weight_rows * product.in_features * 2 / READ
    sent = rows * cut.tile * 4 * (cut.split - 1) / cut.split
    meeting = MEETING + sent / SENT / CLOCK if cut.split > 1 else 0.0
    beside = math.sqrt(math.hypot(block**2, l2**2, memory**2))  # each delays the others a little
    return START + beside + meeting
