"""The factories of recurrent kernels; inputs that are not as declared go to the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llmfw.kernels.cpu import library
from llmfw.kernels.cpu.launch import SUFFIXES
from llmfw.ops import reference_state as reference
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata

_threads = torch.get_num_threads


def causal_conv1d(context: OpContext) -> Callable[..., torch.Tensor]:
    """Every request's window in registers, token after token."""
    native = library.functions()[f"causal_conv1d_{SUFFIXES[context.dtype]}"]
    channels, taps, dtype = context["channels"], context["kernel_size"], context.dtype

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        metadata: AttentionMetadata,
        silu: bool = True,
    ) -> torch.Tensor:
        plain = (
            _batch(metadata)
            and _rows(dtype, x)
            and _whole(dtype, weight)
            and (bias is None or _whole(dtype, bias))
            and _slots(dtype, state, taps - 1, channels)
            and x.shape[1:] == (channels,)
            and weight.shape == (channels, taps)
        )
        if not plain:
            return reference.causal_conv1d(x, weight, bias, state, metadata, silu)
        out = x.new_empty(x.shape)
        native(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            state.data_ptr(),
            out.data_ptr(),
            *_requests(metadata, state),
            channels,
            taps,
            x.stride(0),
            silu,
            _threads(),
        )
        return out

    return run


def selective_scan(context: OpContext) -> Callable[..., torch.Tensor]:
    """Channels side by side, each with its state in the nearest cache, token after token."""
    native = library.functions()[f"selective_scan_{SUFFIXES[context.dtype]}"]
    channels, width, dtype = context["channels"], context["state_size"], context.dtype

    def run(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        z: torch.Tensor,
        dt_bias: torch.Tensor,
        state: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        plain = (
            _batch(metadata)
            and _rows(dtype, x, dt, b, c, z)
            and _whole(torch.float32, a, d, dt_bias)
            and _slots(torch.float32, state, channels, width)
            and x.shape == dt.shape == z.shape == (len(b), channels)
            and b.shape == c.shape == (len(x), width)
            and a.shape == (channels, width)
        )
        if not plain:
            return reference.selective_scan(x, dt, a, b, c, d, z, dt_bias, state, metadata)
        out = x.new_empty(x.shape)
        native(
            x.data_ptr(),
            dt.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            c.data_ptr(),
            d.data_ptr(),
            z.data_ptr(),
            dt_bias.data_ptr(),
            state.data_ptr(),
            out.data_ptr(),
            *_requests(metadata, state),
            channels,
            width,
            *(part.stride(0) for part in (x, dt, b, c, z)),
            _threads(),
        )
        return out

    return run


def ssd_scan(context: OpContext) -> Callable[..., torch.Tensor]:
    """A head at a time, its state in the nearest cache, token after token."""
    native = library.functions()[f"ssd_scan_{SUFFIXES[context.dtype]}"]
    heads, head_dim = context["num_heads"], context["head_dim"]
    groups, width, dtype = context["num_groups"], context["state_size"], context.dtype

    def run(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        dt_bias: torch.Tensor,
        dt_limit: tuple[float, float],
        state: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        tokens = len(x)
        plain = (
            _batch(metadata)
            and _rows(dtype, x, dt, b, c)
            and _whole(torch.float32, a, d, dt_bias)
            and _slots(torch.float32, state, heads, head_dim, width)
            and x.shape == (tokens, heads, head_dim)
            and b.shape == c.shape == (tokens, groups, width)
            and dt.shape == (tokens, heads)
        )
        if not plain:
            return reference.ssd_scan(x, dt, a, b, c, d, dt_bias, dt_limit, state, metadata)
        out = x.new_empty(x.shape)
        native(
            x.data_ptr(),
            dt.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            c.data_ptr(),
            d.data_ptr(),
            dt_bias.data_ptr(),
            *dt_limit,
            state.data_ptr(),
            out.data_ptr(),
            *_requests(metadata, state),
            heads,
            head_dim,
            groups,
            width,
            *(part.stride(0) for part in (x, dt, b, c)),
            _threads(),
        )
        return out

    return run


def _requests(metadata: AttentionMetadata, state: torch.Tensor) -> tuple[int, int, int, int]:
    """What the kernels are told of the batch."""
    slots = metadata.state_slots
    assert slots is not None
    ends = metadata.cu_query_lens
    return slots.data_ptr(), ends.data_ptr(), len(slots), state.stride(0)


def _batch(metadata: AttentionMetadata) -> bool:
    slots = metadata.state_slots
    assert slots is not None, "the batch has no slots for recurrent state"
    return _whole(torch.int64, slots) and _whole(torch.int32, metadata.cu_query_lens)


def _rows(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether they are rows of numbers that lie side by side; the rows may lie apart."""
    return all(
        x.dtype is dtype and x.is_cpu and (not len(x) or x[0].is_contiguous()) for x in tensors
    )


def _whole(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    return all(x.dtype is dtype and x.is_cpu and x.is_contiguous() for x in tensors)


def _slots(dtype: torch.dtype, state: torch.Tensor, *shape: int) -> bool:
    return state.shape[1:] == shape and _rows(dtype, state)
