"""The factories: each gives a callable with its reference's signature that passes addresses to a
native function.

A decode step makes some nine of these calls a layer, so each does only what safety asks for: inputs
that are not what was declared (another dtype or layout) go to the reference, which handles or
refuses them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmfw.kernels.cpu import library
from llmfw.ops import reference
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

SUFFIXES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

_threads = torch.get_num_threads


def linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """Our product up to `row_limit` rows, torch's above."""
    native = _native(context)
    width, outs, dtype = context["in_features"], context["out_features"], context.dtype
    limit = row_limit(context)
    shape = torch.Size((outs, width))

    def run(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        size = x.shape
        if (
            len(size) != 2
            or size[1] != width
            or not 0 < size[0] <= limit
            or weight.shape != shape
            or x.dtype is not dtype
            or weight.dtype is not dtype
            or not x.is_contiguous()
            or not weight.is_contiguous()
            or not x.is_cpu
            or not (bias is None or _plain(dtype, bias))
        ):
            return F.linear(x, weight, bias)
        rows = size[0]
        out = x.new_empty(rows, outs)
        native(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            outs,
            _threads(),
        )
        return out

    return run


def grouped_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """Our product for all groups at once where none has more than `row_limit` rows.

    Else `linear` for each group that has rows.
    """
    native = _native(context)
    groups, width, outs = context["num_groups"], context["in_features"], context["out_features"]
    dtype, limit = context.dtype, row_limit(context)
    product = linear(
        replace(context, op="linear", shape={"in_features": width, "out_features": outs})
    )

    def run(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        plain = (
            _plain(dtype, x, weight)
            and _plain(torch.int32, ends)
            and x.shape == (rows, width)
            and weight.shape == (groups, outs, width)
            and ends.shape == (groups,)
        )
        if not plain or (rows > limit and _most_rows(ends) > limit):
            return each_group(x, weight, ends)
        out = x.new_empty(rows, outs)
        native(
            x.data_ptr(),
            weight.data_ptr(),
            ends.data_ptr(),
            out.data_ptr(),
            rows,
            groups,
            width,
            outs,
            _threads(),
        )
        return out

    def each_group(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for group, end in enumerate(ends.tolist()):
            if end > start:
                out[start:end] = product(x[start:end], weight[group])
            start = end
        return out

    return run


def _most_rows(ends: torch.Tensor) -> int:
    """The rows of the largest group."""
    stops: list[int] = ends.tolist()
    return max(stop - start for start, stop in zip([0, *stops], stops, strict=False))


def head_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """Our product for each head up to `row_limit` tokens, torch's above."""
    native = _native(context)
    heads, width, outs = context["num_heads"], context["in_features"], context["out_features"]
    dtype, limit = context.dtype, row_limit(context)

    def run(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.shape[0]
        if (
            not 0 < tokens <= limit
            or x.shape[1:] != (heads, width)
            or weight.shape != (heads, outs, width)
            or weight.stride()[1:] != (width, 1)
            or x.stride(2) != 1
            or x.dtype is not dtype
            or weight.dtype is not dtype
            or not x.is_cpu
        ):
            return reference.head_linear(x, weight, out)
        product = x.new_empty(tokens, heads, outs)
        native(
            x.data_ptr(),
            weight.data_ptr(),
            product.data_ptr(),
            tokens,
            heads,
            width,
            outs,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            _threads(),
        )
        return product if out is None else out.copy_(product)

    def prepare(weight: torch.Tensor) -> torch.Tensor:
        """A copy where the rows of a head are not stored one after the other."""
        rows_in_order = weight.stride()[1:] == (width, 1)
        return weight if rows_in_order else weight.contiguous()

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def row_limit(context: OpContext) -> int:
    """The most rows that our product takes: above, torch's blocked products are as fast or faster.

    Float32 is always ours; where the CPU multiplies bfloat16 in tiles (AMX), torch is soon ahead.
    """
    if context.dtype is torch.float32:
        return sys.maxsize
    return 24 if "amx_bf16" in context.info.features else 256


def rms_norm(context: OpContext) -> Callable[..., torch.Tensor]:
    """RMS norm over the last dimension."""
    native = _native(context)
    hidden, dtype = context["hidden_size"], context.dtype

    def run(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        if not _plain(dtype, x, weight) or x.shape[-1] != hidden or weight.shape != (hidden,):
            return reference.rms_norm(x, weight, eps, offset)
        out = torch.empty_like(x)
        native(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            offset,
            _threads(),
        )
        return out

    return run


def add_rms_norm(context: OpContext) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """RMS norm of a sum, both results written into the inputs."""
    native, norm = _native(context), rms_norm(replace(context, op="rms_norm"))
    hidden, dtype = context["hidden_size"], context.dtype

    def run(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual.dtype is not dtype:  # a stream in float32
            total = residual + x
            return norm(total.to(x.dtype), weight, eps, offset), total
        if (
            not _plain(dtype, x, residual, weight)
            or x.shape[-1] != hidden
            or x.shape != residual.shape
            or weight.shape != (hidden,)
        ):
            return reference.add_rms_norm(x, residual, weight, eps, offset)
        native(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            offset,
            _threads(),
        )
        return x, residual

    return run


def silu_and_mul(context: OpContext) -> Callable[[torch.Tensor], torch.Tensor]:
    """silu(gate) * up."""
    return _act_and_mul(context, reference.silu_and_mul)


def gelu_and_mul(context: OpContext) -> Callable[[torch.Tensor], torch.Tensor]:
    """gelu(gate) * up, gelu by erf."""
    return _act_and_mul(context, reference.gelu_and_mul)


def gelu_tanh_and_mul(context: OpContext) -> Callable[[torch.Tensor], torch.Tensor]:
    """gelu(gate) * up, gelu by tanh."""
    return _act_and_mul(context, reference.gelu_tanh_and_mul)


def _act_and_mul(
    context: OpContext, fallback: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    native = _native(context)
    width, dtype = context["intermediate_size"], context.dtype

    def run(x: torch.Tensor) -> torch.Tensor:
        if not _plain(dtype, x) or x.shape[-1] != 2 * width:
            return fallback(x)
        out = x.new_empty(*x.shape[:-1], width)
        native(x.data_ptr(), out.data_ptr(), out.numel() // width, width, _threads())
        return out

    return run


def rope_and_cache(context: OpContext) -> Callable[..., torch.Tensor]:
    """Split, head norms, rotation and cache write in one pass."""
    native = _native(context)
    dtype = context.dtype

    def run(
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
        plain = (
            _plain(dtype, qkv, k_cache, v_cache)
            and (cos_sin is None or _plain(torch.float32, cos_sin))
            and _plain(torch.int64, positions, slots)
            and (q_norm is None or _plain(dtype, q_norm))
            and (k_norm is None or _plain(dtype, k_norm))
            and k_cache.shape[2:] == (num_kv_heads, head_dim) == v_cache.shape[2:]
        )
        if not plain:
            return reference.rope_and_cache(
                qkv, positions, cos_sin, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim,
                interleaved, q_norm, k_norm, eps, norm_offset,
            )  # fmt: skip
        tokens = qkv.shape[0]
        q = qkv.new_empty(tokens, num_heads, head_dim)
        native(
            qkv.data_ptr(),
            positions.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            q.data_ptr(),
            tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            0 if cos_sin is None else cos_sin.shape[1],
            interleaved,
            eps,
            norm_offset,
            _threads(),
        )
        return q

    return run


def latent_rope_and_cache(context: OpContext) -> Callable[..., torch.Tensor]:
    """Norm, rotation and cache write of latents in one pass."""
    native = _native(context)
    dtype, latent_dim, rotary_dim = context.dtype, context["latent_dim"], context["rotary_dim"]

    def run(
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
        tokens, heads, width = q.shape
        plain = (
            _plain(dtype, kv, cache)
            and (cos_sin is None or _plain(torch.float32, cos_sin))
            and _plain(torch.int64, positions, slots)
            and (norm is None or _plain(dtype, norm))
            and q.dtype is dtype
            and q.stride(2) == 1
            and width == rotary_dim
            and kv.shape == (tokens, latent_dim + rotary_dim)
            and cache.shape[2:] == (1, latent_dim + rotary_dim)
        )
        if not plain:
            return reference.latent_rope_and_cache(
                q, kv, positions, cos_sin, cache, slots, interleaved, norm, eps, out
            )
        turned = q.new_empty(tokens, heads, rotary_dim)
        native(
            q.data_ptr(),
            kv.data_ptr(),
            positions.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            cache.data_ptr(),
            slots.data_ptr(),
            0 if norm is None else norm.data_ptr(),
            turned.data_ptr(),
            tokens,
            heads,
            latent_dim,
            rotary_dim,
            q.stride(0),
            q.stride(1),
            interleaved,
            eps,
            _threads(),
        )
        return turned if out is None else out.copy_(turned)

    return run


def paged_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """Any mix of context and generation requests in one call."""
    native = _native(context)
    dtype = context.dtype

    def run(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        view: CacheGroupView,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tables = view.block_tables
        v_stride = _row_stride(v_cache)
        if (
            not _plain(dtype, q, k_cache)
            or v_cache.dtype is not dtype
            or not v_cache.is_cpu
            or not v_stride
            or not _plain(torch.int32, tables, metadata.cu_query_lens, metadata.kv_lens_device)
        ):
            return reference.paged_attention(
                q, k_cache, v_cache, metadata, view, scale, window, softcap, sinks
            )
        tokens, heads, head_dim = q.shape
        _, block_size, kv_heads, v_dim = v_cache.shape
        if sinks is not None and not _plain(torch.float32, sinks):
            sinks = sinks.float().contiguous()
        out = q.new_empty(tokens, heads * v_dim)
        native(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            metadata.cu_query_lens.data_ptr(),
            metadata.kv_lens_device.data_ptr(),
            tables.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            tables.shape[1],
            metadata.num_requests,
            heads,
            kv_heads,
            head_dim,
            v_dim,
            v_stride,
            block_size,
            window or 0,
            scale,
            softcap or 0.0,
            _threads(),
        )
        return out

    return run


def _native(context: OpContext) -> library.NativeFunction:
    return library.functions()[f"{context.op}_{SUFFIXES[context.dtype]}"]


def _row_stride(cache: torch.Tensor) -> int:
    """Elements from one head's row [.., D] of a cache to the next, 0 where rows are not regular."""
    if cache.is_contiguous():
        return cache.shape[-1]
    _, block_size, heads, _ = cache.shape
    row = cache.stride(2)
    regular = (block_size * heads * row, heads * row, row, 1)
    return row if cache.stride() == regular else 0


def _plain(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether all are what native functions read: contiguous, of this dtype, in host memory."""
    for tensor in tensors:  # a loop: all() over a generator takes twice as long
        if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            return False
    return True
