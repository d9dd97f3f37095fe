"""Launcher of rope_cache.cu: the op `rope_and_cache`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import dense, pointer
from llmfw.ops.kernel import OpContext

THREADS = 128


def pack_width(head_dim: int, rotary_dim: int, itemsize: int, interleaved: bool) -> int:
    """The widest pack of which pairs tile the rotated and the other part of a head, or 0."""
    width = 16 // itemsize
    while width >= (2 if interleaved else 1):
        if (
            head_dim % (2 * width) == 0
            and rotary_dim % (2 * width) == 0
            and head_dim // (2 * width) <= 32
        ):
            return width
        width //= 2
    return 0


def lanes_of(head_dim: int, width: int) -> int:
    """How many lanes serve a head of such packs: a power of two."""
    return 1 << (head_dim // (2 * width) - 1).bit_length()


def supports(context: OpContext) -> str | None:
    """Pairs of packs must tile a head, within one warp."""
    head, rotary = context["head_dim"], context["rotary_dim"] or context["head_dim"]
    if pack_width(head, rotary, context.dtype.itemsize, bool(context["interleaved"])):
        return None
    return f"head size {head} with {rotary} rotated is not whole packs"


def rope_and_cache(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `rope_and_cache` for one head layout."""
    q_heads, kv_heads, dim = context["num_heads"], context["num_kv_heads"], context["head_dim"]
    rotary, turned = context["rotary_dim"] or dim, bool(context["interleaved"])
    width = pack_width(dim, rotary, context.dtype.itemsize, turned)
    lanes = lanes_of(dim, width)
    module = load(
        "rope_cache.cu",
        context.info.device,
        context.dtype,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=dim,
        ROTARY_DIM=rotary,
        INTERLEAVED=int(turned),
        WIDTH=width,
        LANES=lanes,
        THREADS=THREADS,
    )
    launch = module.launcher("rope_and_cache", "PPPPPPPPPqqqiff")
    heads, per_block = q_heads + 2 * kv_heads, THREADS // lanes
    layout = (q_heads, kv_heads, dim, turned)

    def call(
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        interleaved: bool = False,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        norm_offset: float = 0.0,
    ) -> torch.Tensor:
        if (num_heads, num_kv_heads, head_dim, bool(interleaved)) != layout:
            raise KernelError(
                f"rope_and_cache was built for (heads, kv heads, head size, interleaved) {layout}, "
                f"called with {(num_heads, num_kv_heads, head_dim, interleaved)}"
            )
        if qkv.stride(-1) != 1 or qkv.data_ptr() % 16 or qkv.stride(0) % width:
            qkv = qkv.contiguous().clone()
        cos_sin = None if cos_sin is None else dense(cos_sin)
        tokens = qkv.shape[0]
        q = torch.empty((tokens, q_heads, dim), dtype=qkv.dtype, device=qkv.device)
        if tokens:
            launch(
                (-(-tokens * heads // per_block), 1, 1),
                (THREADS, 1, 1),
                q.data_ptr(),
                qkv.data_ptr(),
                positions.data_ptr(),
                pointer(cos_sin),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                slots.data_ptr(),
                pointer(q_norm),
                pointer(k_norm),
                qkv.stride(0),
                slot_stride(k_cache),
                slot_stride(v_cache),
                tokens,
                eps,
                norm_offset,
            )
        return q

    return call


def slot_stride(cache: torch.Tensor) -> int:
    """Scalars from one slot of a paged cache to the next.

    Raises:
        KernelError: If the slots are not evenly spaced with contiguous heads.
    """
    block, slot, head, last = cache.stride()
    if last != 1 or head != cache.shape[3] or block != slot * cache.shape[1]:
        raise KernelError(
            f"a cache of shape {tuple(cache.shape)} with strides {cache.stride()} is not served"
        )
    return slot
