"""Calls of recurrent layers' ops that are worth timing, and the bytes that they have to move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata

STATE_AT = {"causal_conv1d": 3, "selective_scan": 8, "ssd_scan": 8}  # which argument it is
MOST_REQUESTS = 64  # a batch of up to so many tokens has one of each request
_BLOCK = 16


def batch_of(context: OpContext, tokens: int, kv_len: int) -> AttentionMetadata:
    """Generation requests of one token each, or one prompt, each in the slot of its number."""
    device = context.info.device
    if tokens <= MOST_REQUESTS:
        return single_tokens(tokens, kv_len, device)
    metadata, _, _ = paged_batch(((tokens, tokens),), 1, _BLOCK, torch.Generator(), device)
    return replace(metadata, state_slots=torch.arange(1, device=device))


def single_tokens(requests: int, kv_len: int, device: torch.device) -> AttentionMetadata:
    """Generation requests of one token each, each in the slot of its number."""
    generator = torch.Generator().manual_seed(0)
    metadata, _, _ = paged_batch(((1, kv_len),) * requests, 0, _BLOCK, generator, device)
    return replace(metadata, state_slots=torch.arange(requests, device=device))


def state_bytes(op: str, arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> float:
    """Every tensor given is read, every result written; the state is both."""
    given = [each for each in arguments if isinstance(each, torch.Tensor)]
    return float(sum(each.nbytes for each in (*given, *results, arguments[STATE_AT[op]])))


def causal_conv1d(context: OpContext, tokens: int, kv_len: int) -> tuple[Any, ...]:
    """x is a part of wider rows, as behind a projection that gives more."""
    channels, taps = context["channels"], context["kernel_size"]
    metadata = batch_of(context, tokens, kv_len)
    x = _normal(context, tokens, channels + 64)[:, :channels]
    state = _normal(context, metadata.num_requests, taps - 1, channels)
    weight, bias = _normal(context, channels, taps), _normal(context, channels)
    return x, weight, bias, state, metadata


def selective_scan(context: OpContext, tokens: int, kv_len: int) -> tuple[Any, ...]:
    """Slow and fast decays."""
    channels, size, device = context["channels"], context["state_size"], context.info.device
    metadata = batch_of(context, tokens, kv_len)
    a = -torch.rand(channels, size, device=device)
    d, dt_bias = (torch.randn(channels, device=device) for _ in range(2))
    x, dt, z = (_normal(context, tokens, channels) for _ in range(3))
    b, c = (_normal(context, tokens, size) for _ in range(2))
    state = torch.randn(metadata.num_requests, channels, size, device=device)
    return x, dt, a, b, c, d, z, dt_bias, state, metadata


def ssd_scan(context: OpContext, tokens: int, kv_len: int) -> tuple[Any, ...]:
    """Slow and fast decays."""
    heads, head_dim, device = context["num_heads"], context["head_dim"], context.info.device
    groups, size = context["num_groups"], context["state_size"]
    metadata = batch_of(context, tokens, kv_len)
    a = -torch.rand(heads, device=device)
    d, dt_bias = (torch.randn(heads, device=device) for _ in range(2))
    x, dt = _normal(context, tokens, heads, head_dim), _normal(context, tokens, heads)
    b, c = (_normal(context, tokens, groups, size) for _ in range(2))
    state = torch.randn(metadata.num_requests, heads, head_dim, size, device=device)
    return x, dt, a, b, c, d, dt_bias, (0.0, math.inf), state, metadata


def gated_rms_norm(context: OpContext, tokens: int, kv_len: int) -> tuple[Any, ...]:
    """The gate is a part of wider rows."""
    hidden = context["hidden_size"]
    gate = _normal(context, tokens, hidden + 64)[:, :hidden]
    weight = _normal(context, hidden)
    return _normal(context, tokens, hidden), gate, weight, 1e-5, context["num_groups"]


def _normal(context: OpContext, *size: int) -> torch.Tensor:
    return torch.randn(size, device=context.info.device).to(context.dtype)
