"""Which cuts of tiled.cu are worth measuring for a shape: those with the least estimated time.

A block takes its tensor cores' time, and the time in which what it reads comes to its shared
memory; the weight takes what it takes from memory. Each delays the others a little. Blocks run in
rounds, so a cut is good when its last round is full. Where blocks split the sum, each sends sums to
the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llmfw.kernels.cupy.compile import multiprocessors
from llmfw.kernels.cupy.products import TILED_ROWS
from llmfw.kernels.cupy.streamed import servable
from llmfw.kernels.cupy.tiled import CHUNK, GROUP_ROWS, GROUPS, SHARED_BYTES, Tiled
from llmfw.ops.kernel import OpContext

CLOCK = 1.75e9  # cycles a second that multiprocessors reach in such products
READ = 3.12e12  # bytes a second from memory, of all multiprocessors
FETCHED = 105e9  # bytes a second that come to the shared memory of one
SENT = 12e9  # bytes a second from one's shared memory to another's, 16 at a time
PRODUCTS = 2048  # multiplications and additions of a multiprocessor's tensor cores a cycle
MEETING = 0.5e-6  # seconds that blocks of a cluster wait for each other
LEAST_CHUNK = 0.17e-6  # seconds of a chunk of the summed dimension, however small,
LEAST_BROUGHT = 0.45e-6  # and where a thread that multiplies asks for tiles too
START = 1.5e-6  # seconds until the first chunk is there
STORED = 12e-9  # seconds that a row of the tile takes at the end, when nothing is read any more
LEAST_TILE, MOST_TILE = 32, 256  # columns of one instruction
MOST_SUMS = 224  # of a thread, in registers
MEASURED = 2  # cuts
MOST_ROUNDS = 3  # of blocks: with more, blocks that read the same tile drift apart
FEW_ROWS, LONG = 128, 8192  # more rows and as many inputs are left to the library
ALIKE = 32  # rows of a tile below which cuts of one kind take about as long


class Kind(NamedTuple):
    """Most rows of x that a block has, blocks that share x, and that split the summed dimension."""

    rows: int
    share: int
    split: int


KINDS = (  # as won somewhere
    Kind(256, 2, 1),
    Kind(256, 1, 4),
    Kind(128, 1, 1),
    Kind(128, 1, 2),
    Kind(128, 1, 4),
    Kind(64, 1, 1),
    Kind(64, 1, 2),
)


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
    if loses_in_steps(product):
        return ()
    return best_cuts(product, multiprocessors(context.info.device), MEASURED)


def loses_in_steps(product: Product) -> bool:
    """Whether own cuts are ahead of the library alone, but behind it in whole steps.

    A step of so many rows draws all the power that the card may.
    """
    return product.rows > FEW_ROWS and product.in_features >= LONG


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
    kinds = ((each.parts, each.share, each.split) for each in (cut, other))
    return len(set(kinds)) == 1 and abs(cut.tile - other.tile) < ALIKE


def cuts(product: Product) -> Iterator[Tiled]:
    """All that a block's registers and memory allow, in whole groups of 8 results, each once."""
    step = 8 * (1 + product.gated)
    for parts, share, split in dict.fromkeys(
        (max(1, product.rows // kind.rows), kind.share, kind.split) for kind in KINDS
    ):
        each = max(1, product.rows // parts // GROUP_ROWS // GROUPS)  # 64s of a warpgroup
        for tile in range(max(step, LEAST_TILE), 1 + min(MOST_TILE, 2 * MOST_SUMS // each), step):
            cut = Tiled(tile, share, split, product.gated, parts)
            if cut.shared_bytes(product.rows) <= SHARED_BYTES:
                yield cut


def estimate(cut: Tiled, product: Product, sms: int) -> float | None:
    """Seconds; None for too many rounds, or if blocks of a split would not run at the same time."""
    clusters, at_once = cut.clusters(product.weight_rows), cut.at_once(sms)
    chunks = -(-product.in_features // CHUNK)
    if cut.split > 1 and (clusters > at_once or chunks < cut.split):
        return None
    rounds, chunks = -(-clusters // at_once), -(-chunks // cut.split)
    if rounds > MOST_ROUNDS:
        return None
    rows = cut.block_rows(product.rows)
    least = LEAST_CHUNK if cut.has_bringer(product.rows) else LEAST_BROUGHT
    chunk = max(least, rows * cut.tile * CHUNK / PRODUCTS / CLOCK)
    multiplied = rounds * chunks * chunk
    fetched = rounds * chunks * (rows + cut.tile) * CHUNK * 2 / FETCHED
    memory = product.weight_rows * product.in_features * 2 / READ
    beside = math.sqrt(math.hypot(multiplied**2, fetched**2, memory**2))
    sent = rows * cut.tile * 4 * (cut.split - 1) / cut.split
    meeting = MEETING if cut.cluster > 1 else 0.0
    return START + beside + sent / SENT + meeting + STORED * cut.tile
