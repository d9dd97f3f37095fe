"""Launcher of paged_decode.cu: attention of few query tokens a request over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.compile import device_index, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.ops.kernel import OpContext

MAX_SPLITS = 64
COUNTERS = 1 << 16
KEYS_OF_A_TILE = 16
SHARED_BYTES = 48 << 10
LONG_SHARE = 2048  # keys that a block walks at least where the requests alone fill the device
LONG_WAVES = 2  # of blocks, so that such requests are split at all
UNSETTLED = 1 << 30  # more keys than any request has


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


def check_block_size(built: int, called: int) -> None:
    """Hold the cache of a call against the blocks that attention was built for.

    Raises:
        KernelError: If they differ.
    """
    if built != called:
        raise KernelError(
            f"attention was built for blocks of {built} tokens, called with {called}",
            hint="give the cache the block_size of the model's configuration",
        )


def supports(context: OpContext) -> str | None:
    """Head sizes of whole mma tiles up to 256, blocks of whole half tiles."""
    heads = Heads.of(context)
    if context.shape.get("latent"):
        return "reads V from a tensor of its own, not from a latent cache"
    if heads.head_dim % 16 or heads.v_dim % 16 or max(heads.head_dim, heads.v_dim) > 256:
        return f"head sizes {heads.head_dim} and {heads.v_dim} are not multiples of 16 up to 256"
    if heads.block_size % 8:
        return f"block size {heads.block_size} is not a multiple of 8"
    if heads.num_heads % heads.num_kv_heads:
        return f"{heads.num_heads} heads do not share {heads.num_kv_heads} KV heads evenly"
    return None


def resident_blocks(dim: int, warps: int) -> int:
    """Blocks of one multiprocessor at once, which sets the registers that each may use."""
    of_four_warps = 4 if dim <= 64 else 3 if dim <= 96 else 2 if dim <= 128 else 1
    return max(1, of_four_warps * 4 // warps)


@dataclass(frozen=True)
class Plan:
    """How one launch is divided.

    Args:
        rows: Query rows of a block.
        warps: Warps of a block.
        columns: Blocks a request and split.
        splits: Most parts that a request's keys are divided into.
        least_share: Fewest tiles of 16 keys that a part has.
    """

    rows: int
    warps: int
    columns: int
    splits: int
    least_share: int


def plan_launch(
    heads: Heads, requests: int, max_q: int, max_kv: int, sms: int, splits: int | None = None
) -> Plan:
    """Divide a batch of at most these lengths over the device; `splits` overrides the rule.

    Few blocks get 8 warps each, so that less is left to combine. Splits fill the device once: more
    cost more than they gain. Where the requests alone fill it, only very long ones are split.
    """
    widest = max(heads.head_dim, heads.v_dim)
    rows = 16 if heads.group * max_q > 8 and widest <= 128 else 8
    columns = heads.num_kv_heads * -(-heads.group * max_q // rows)
    blocks = columns * requests
    resident = resident_blocks(widest, 8)
    wide = blocks <= sms * resident and 8 * rows * (widest + 4) * 4 < SHARED_BYTES - 2048
    warps = 8 if wide else 4
    slots = sms * resident_blocks(widest, warps)
    round_keys = KEYS_OF_A_TILE * warps
    if splits is not None:
        return Plan(rows, warps, columns, splits, warps)
    if blocks > COUNTERS:
        return Plan(rows, warps, columns, 1, warps)
    if blocks <= slots // 2:
        splits = min(slots // blocks, -(-max_kv // round_keys))
        return Plan(rows, warps, columns, min(splits, MAX_SPLITS), warps)
    splits = min(-(-LONG_WAVES * slots // blocks), -(-max_kv // LONG_SHARE), MAX_SPLITS)
    return Plan(rows, warps, columns, splits, LONG_SHARE // KEYS_OF_A_TILE)


class PagedDecode:
    """The compiled kernels for one head layout, and the counters that its blocks meet at.

    Launches of one instance must follow each other on one stream.
    """

    def __init__(self, context: OpContext) -> None:
        self.heads = Heads.of(context)
        self._context = context
        device = context.info.device
        self._launchers: dict[tuple[int, int], Launcher] = {}
        properties = torch.cuda.get_device_properties(device_index(device))
        self._sms = properties.multi_processor_count
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def plan(self, requests: int, max_q: int, max_kv: int, splits: int | None = None) -> Plan:
        """How a batch of at most these lengths is launched."""
        return plan_launch(self.heads, requests, max_q, max_kv, self._sms, splits)

    def launcher(self, rows: int, warps: int) -> Launcher:
        """The kernel for blocks of so many rows and warps, compiled when first wanted."""
        found = self._launchers.get((rows, warps))
        if found is None:
            heads, context = self.heads, self._context
            found = load(
                "paged_decode.cu",
                context.info.device,
                context.dtype,
                HEAD_DIM=heads.head_dim,
                V_DIM=heads.v_dim,
                GROUP=heads.group,
                ROWS=rows,
                BLOCK_SIZE=heads.block_size,
                SOFTCAP=int(heads.softcap),
                WARPS=warps,
                MIN_BLOCKS=resident_blocks(max(heads.head_dim, heads.v_dim), warps),
            ).launcher("paged_decode", "PPPPPPPPPPPqqqqqqiiiiiiff")
            self._launchers[rows, warps] = found
        return found

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
        settled: bool = False,
        splits: int | None = None,
    ) -> None:
        """Attend for `requests` requests from `first_request` on, into their rows of `out`.

        out: [T, heads * v_dim]. max_q and max_kv bound the lengths, which the kernel reads from the
        device. settled: all requests of the batch generate one token, so that all keys but the last
        block's are those of earlier steps. `splits` overrides the plan.
        """
        heads = self.heads
        if bool(softcap) != heads.softcap:
            raise KernelError(
                f"paged_decode was built with softcap {heads.softcap}, called with {softcap}"
            )
        plan = self.plan(requests, max_q, max_kv, splits)
        partial = stats = 0
        if plan.splits > 1:
            slots = requests * plan.columns * plan.splits * plan.rows
            workspace = torch.empty(slots * (heads.v_dim + 2), dtype=torch.float32, device=q.device)
            partial = workspace.data_ptr()
            stats = partial + slots * heads.v_dim * 4
        self.launcher(plan.rows, plan.warps)(
            (plan.columns, plan.splits, requests),
            (plan.warps * 32, 1, 1),
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
            block_tables.shape[1],
            window or 0,
            plan.least_share,
            heads.block_size if settled else UNSETTLED,
            scale,
            softcap or 0.0,
        )
