"""The op `rope_and_attend`: what a step of generation requests does between two products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import paged_decode, rope_cache
from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher, dense, pointer
from llmfw.kernels.cupy.paged_decode import PagedDecode, check_block_size
from llmfw.kernels.cupy.paged_plan import REGISTERS_DIM, Cut, Heads
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

SIGNATURE = "PPPPPPPPPPPPPPPPqqqqqqiiiiffff"


def supports(context: OpContext) -> str | None:
    """What both ops support, where tiles of keys fit in registers and V is as wide as K."""
    heads = Heads.of(context)
    if heads.v_dim != heads.head_dim or heads.head_dim > REGISTERS_DIM:
        return f"head sizes {heads.head_dim} and {heads.v_dim} are not one up to {REGISTERS_DIM}"
    return rope_cache.supports(context) or paged_decode.supports(context)


class RopeAndAttend:
    """The compiled kernels for one head layout, divided over the device as paged_decode is."""

    def __init__(self, context: OpContext) -> None:
        self.decode = PagedDecode(context, beside=True)
        self._most_requests = self.decode.most_at_once()
        self._context = context
        self._launchers: dict[tuple[int, Cut], Launcher] = {}
        rotary = context["rotary_dim"] or context["head_dim"]
        dim, turned = context["head_dim"], bool(context["interleaved"])
        self._width = rope_cache.pack_width(dim, rotary, context.dtype.itemsize, turned)
        self._rotation = {
            "ROTARY_DIM": rotary,
            "INTERLEAVED": int(turned),
            "WIDTH": self._width,
            "LANES": rope_cache.lanes_of(dim, self._width),
        }

    def pays(self, metadata: AttentionMetadata) -> bool:
        """Whether it serves a batch: every request generates one token, and all start at once.

        Of more blocks than are resident each waits for its own heads: there two kernels are
        quicker.
        """
        singles = not metadata.num_contexts and metadata.max_query_len == 1
        return singles and metadata.num_requests <= self._most_requests

    def launcher(self, rows: int, cut: Cut) -> Launcher:
        """The kernel for blocks of so many rows and such a cut, compiled when first wanted."""
        found = self._launchers.get((rows, cut))
        if found is None:
            context, constants = self._context, self.decode.constants(rows, cut)
            module = load(
                "rope_decode.cu", context.info.device, context.dtype, **constants, **self._rotation
            )
            found = module.launcher("rope_decode", SIGNATURE)
            self._launchers[rows, cut] = found
        return found

    def __call__(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        view: CacheGroupView,
        scale: float,
        interleaved: bool = False,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        norm_offset: float = 0.0,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the reference, of batches that it pays for.

        Raises:
            KernelError: If it was built for something else.
        """
        heads = self.decode.heads
        built = (bool(self._rotation["INTERLEAVED"]), heads.softcap)
        if (bool(interleaved), bool(softcap)) != built:
            raise KernelError(
                f"rope_and_attend was built for (interleaved, softcap) {built}, "
                f"called with {(interleaved, softcap)}"
            )
        check_block_size(heads.block_size, view.block_size)
        if qkv.stride(-1) != 1 or qkv.data_ptr() % 16 or qkv.stride(0) % self._width:
            qkv = qkv.contiguous().clone()
        cos_sin = None if cos_sin is None else dense(cos_sin)
        if sinks is not None and sinks.dtype is not torch.float32:
            sinks = sinks.float()
        requests = metadata.num_requests
        out = torch.empty(
            (requests, heads.num_heads * heads.v_dim), dtype=qkv.dtype, device=qkv.device
        )
        plan = self.decode.plan(requests, 1, metadata.max_kv_len)
        meeting = self.decode.meeting(requests, plan)
        self.launcher(plan.rows, plan.cut)(
            (plan.columns, plan.splits, requests),
            (plan.cut.warps * 32, 1, 1),
            out.data_ptr(),
            qkv.data_ptr(),
            positions.data_ptr(),
            pointer(cos_sin),
            pointer(q_norm),
            pointer(k_norm),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            view.slots.data_ptr(),
            view.block_tables.data_ptr(),
            metadata.cu_query_lens.data_ptr(),
            metadata.kv_lens_device.data_ptr(),
            pointer(sinks),
            meeting.partial,
            meeting.stats,
            meeting.counters,
            qkv.stride(0),
            view.block_tables.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
            heads.num_kv_heads,
            view.block_tables.shape[1],
            window or 0,
            plan.least_share,
            eps,
            norm_offset,
            scale,
            softcap or 0.0,
        )
        return out


def rope_and_attend(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `rope_and_attend` for one head layout."""
    return RopeAndAttend(context)
