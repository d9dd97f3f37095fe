"""How attention of few query tokens a request is divided over a device."""

from __future__ import annotations

from dataclasses import dataclass

from llmfw.errors import KernelError
from llmfw.ops.kernel import OpContext

MAX_SPLITS = 64
COUNTERS = 1 << 16
KEYS_OF_A_TILE = 16
REGISTERS_DIM = 128  # up to this head size a tile of K and V fits in a warp's registers
SLAB_BYTES = 46 << 10  # shared memory that the warps' sums may take where no launch asks for more
FEW_STAGES, MANY_STAGES = 3, 2  # tiles under way for few blocks, and for many
LEAST_STAGES = 2  # one alone would hide nothing
LEAST_SHARED_BYTES = 99 << 10  # of a block, what devices of compute capability 8.0 and newer have
COPYING_SHARED_BYTES = 227 << 10  # what those have that have tensor copies as used here: 9.0
SYSTEM_BYTES = 1 << 10  # of a resident block's shared memory
RESERVED_BYTES = SYSTEM_BYTES + (1 << 10)  # and those of its warps' statistics
MOST_WARPS = 8  # of a multiprocessor, whose registers they need all
LONG_SHARE = 2048  # keys that a block walks at least where the requests alone fill the device
AHEAD = 1  # tiles that a warp asks for into L2 beyond those that it loads,
AHEAD_WAVES = 2  # where there are at most so many waves of blocks: more keep memory busy themselves
LONG_WAVES = 2  # of blocks, so that such requests are split at all
MOST_COPIED = 6  # tiles of a warp under way by tensor copies
ALIGNED_BYTES = 1 << 10  # that tiles brought by tensor copies begin at
BARRIER_BYTES = 8  # of a tile
SPAN = 64  # values that a row of a box has


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

    @property
    def widest(self) -> int:
        """The greater one of both head sizes."""
        return max(self.head_dim, self.v_dim)

    @property
    def tile_bytes(self) -> int:
        """K and V of a tile, of 16-bit values."""
        return KEYS_OF_A_TILE * (self.head_dim + self.v_dim) * 2

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


@dataclass(frozen=True)
class Device:
    """What plans depend on.

    Args:
        sms: Multiprocessors.
        shared_bytes: The most shared memory of a block.
    """

    sms: int
    shared_bytes: int = LEAST_SHARED_BYTES


@dataclass(frozen=True)
class Cut:
    """How a multiprocessor is shared.

    Args:
        warps: Warps of a block.
        resident: Blocks at once, for which registers are left.
        stages: Tiles of a warp under way in shared memory; 0 where registers hold them.
        ahead: Tiles of a warp that are asked for into L2, beside those in registers.
        copied: Whether tensor copies bring them to shared memory, not threads.
    """

    warps: int
    resident: int
    stages: int = 0
    ahead: int = 0
    copied: bool = False

    @property
    def source(self) -> str:
        """The kernel, and the name of its file."""
        if self.copied:
            return "paged_streamed"
        return "paged_staged" if self.stages else "paged_decode"

    def shared_bytes(self, heads: Heads) -> int:
        """Shared memory that a launch asks for."""
        each = heads.tile_bytes + BARRIER_BYTES if self.copied else heads.tile_bytes
        return self.warps * self.stages * each


@dataclass(frozen=True)
class Plan:
    """How one launch is divided.

    Args:
        rows: Query rows of a block.
        cut: Its warps, and what they have under way.
        columns: Blocks a request and split.
        splits: Most parts that a request's keys are divided into.
        least_share: Fewest tiles of 16 keys that a part has.
    """

    rows: int
    cut: Cut
    columns: int
    splits: int
    least_share: int


def registers_cut(heads: Heads, rows: int, blocks: int, device: Device) -> Cut:
    """Blocks whose tiles lie in registers: few get 8 warps each, so that less is left to join."""
    dim = heads.widest
    resident = 4 if dim <= 64 else 3 if dim <= 96 else 2
    ahead = AHEAD if blocks <= AHEAD_WAVES * device.sms * resident else 0
    wide = Cut(8, resident // 2, ahead=ahead)
    slab = wide.warps * rows * (dim + 4) * 4
    fits = blocks <= device.sms * wide.resident and slab < SLAB_BYTES
    return wide if fits else Cut(4, resident, ahead=ahead)


def staged_cut(heads: Heads, blocks: int, device: Device) -> Cut:
    """Blocks whose tiles lie in shared memory: as many at once as that and registers allow.

    Up to one block a multiprocessor, each has up to 8 warps and 3 tiles of each under way, which
    shortens a lone block's time; beyond, 4 warps and 2 tiles, so that a block begins sooner.
    Where shared memory is too little, fewer tiles, then fewer warps.

    Raises:
        KernelError: If it is too little for 2 warps of 2 tiles.
    """
    few = blocks <= device.sms
    most = FEW_STAGES if few else MANY_STAGES
    for warps in (8, 4, 2) if few else (4, 2):
        for resident in range(MOST_WARPS // warps, 0, -1):
            room = (device.shared_bytes + SYSTEM_BYTES) // resident - RESERVED_BYTES
            stages = min(most, room // (warps * heads.tile_bytes))
            if stages >= LEAST_STAGES:
                return Cut(warps, resident, stages)
    raise KernelError(f"{device.shared_bytes} bytes of shared memory are too few for {heads}")


def copied_cut(heads: Heads, few: bool) -> Cut:
    """Blocks whose tiles are brought by tensor copies; `few`: one a multiprocessor at most."""
    warps, resident = (8, 1) if few else (4, 2)
    room = (COPYING_SHARED_BYTES + SYSTEM_BYTES) // resident - RESERVED_BYTES - ALIGNED_BYTES
    stages = min(MOST_COPIED, room // (warps * (heads.tile_bytes + BARRIER_BYTES)))
    return Cut(warps, resident, stages, copied=True)


def copies_refusal(heads: Heads) -> str | None:
    """Why copies cannot bring tiles: they are no whole boxes, or too large for two a warp."""
    if heads.head_dim % SPAN or heads.v_dim % SPAN:
        return f"head sizes {heads.head_dim} and {heads.v_dim} are not multiples of {SPAN}"
    if heads.block_size % KEYS_OF_A_TILE:
        return f"block size {heads.block_size} is not a multiple of {KEYS_OF_A_TILE}"
    if any(copied_cut(heads, few).stages < LEAST_STAGES for few in (True, False)):
        sizes = f"{heads.head_dim} and {heads.v_dim}"
        return f"shared memory is too little for {LEAST_STAGES} tiles a warp of head sizes {sizes}"
    return None


def plan_launch(
    heads: Heads,
    requests: int,
    max_q: int,
    max_kv: int,
    device: Device,
    splits: int | None = None,
    copied: bool = False,
) -> Plan:
    """Divide a batch of at most these lengths over the device; `splits` overrides the rule.

    Splits fill the device once: more cost more than they gain. Where the requests alone fill it,
    only very long ones are split. `copied` and head sizes decide where tiles lie;
    `copied_cut`, `staged_cut` and `registers_cut` how blocks are made.
    """
    staged = heads.widest > REGISTERS_DIM
    rows = 16 if heads.group * max_q > 8 and not staged else 8
    columns = heads.num_kv_heads * -(-heads.group * max_q // rows)
    blocks = columns * requests
    if copied:
        cut = copied_cut(heads, blocks <= device.sms)
    elif staged:
        cut = staged_cut(heads, blocks, device)
    else:
        cut = registers_cut(heads, rows, blocks, device)
    slots = device.sms * cut.resident
    if splits is not None:
        return Plan(rows, cut, columns, splits, cut.warps)
    if blocks > COUNTERS:
        return Plan(rows, cut, columns, 1, cut.warps)
    if blocks <= slots // 2:
        splits = min(slots // blocks, -(-max_kv // (KEYS_OF_A_TILE * cut.warps)))
        return Plan(rows, cut, columns, min(splits, MAX_SPLITS), cut.warps)
    splits = min(-(-LONG_WAVES * slots // blocks), -(-max_kv // LONG_SHARE), MAX_SPLITS)
    return Plan(rows, cut, columns, splits, LONG_SHARE // KEYS_OF_A_TILE)
