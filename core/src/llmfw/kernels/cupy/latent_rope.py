"""Launcher of latent_rope.cu: the op `latent_rope_and_cache`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.rope_cache import slot_stride
from llmfw.ops.kernel import OpContext

THREADS = 128
WIDEST = 4  # values of an access: all threads share a latent of 512


def supports(context: OpContext) -> str | None:
    """Pairs of rotated features; latents that a block holds in registers."""
    if context["rotary_dim"] % 2:
        return f"{context['rotary_dim']} rotated features are not pairs"
    if context["latent_dim"] > THREADS * WIDEST * 8:
        return f"a latent of {context['latent_dim']} is too wide"
    return None


def pack_width(latent_dim: int, rotary_dim: int) -> int:
    """The most values of an access that divide the latent and a cached row."""
    width = WIDEST
    while latent_dim % width or rotary_dim % width:
        width //= 2
    return width


def latent_rope_and_cache(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `latent_rope_and_cache` for one layout."""
    heads, latent, rotary = context["num_heads"], context["latent_dim"], context["rotary_dim"]
    turned, width = bool(context["interleaved"]), pack_width(latent, rotary)
    launch = load(
        "latent_rope.cu",
        context.info.device,
        context.dtype,
        HEADS=heads,
        LATENT_DIM=latent,
        ROTARY_DIM=rotary,
        INTERLEAVED=int(turned),
        WIDTH=width,
        THREADS=THREADS,
    ).launcher("latent_rope", "PPPPPPPPqqqqqqf")
    blocks = 1 + -(-heads * rotary // 2 // THREADS)
    aligned = width * context.dtype.itemsize

    def call(
        q: torch.Tensor,
        kv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: torch.Tensor,
        slots: torch.Tensor,
        interleaved: bool = False,
        norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if q.shape[1:] != (heads, rotary) or bool(interleaved) != turned:
            raise KernelError(
                f"latent_rope_and_cache was built for {heads} heads of {rotary} features, "
                f"interleaved {turned}, called with {tuple(q.shape[1:])}, {interleaved}"
            )
        if q.stride(-1) != 1:
            q = q.contiguous()
        if kv.stride(-1) != 1 or kv.stride(0) % width or kv.data_ptr() % aligned:
            kv = kv.contiguous().clone()
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tokens = q.shape[0]
        if tokens:
            launch(
                (tokens, blocks, 1),
                (THREADS, 1, 1),
                out.data_ptr(),
                q.data_ptr(),
                kv.data_ptr(),
                positions.data_ptr(),
                pointer(cos_sin),
                cache.data_ptr(),
                slots.data_ptr(),
                pointer(norm),
                out.stride(0),
                out.stride(1),
                q.stride(0),
                q.stride(1),
                kv.stride(0),
                slot_stride(cache),
                eps,
            )
        return out

    return call
