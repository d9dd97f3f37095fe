"""The references of recurrent layers equal the recurrences they stand for, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmfw.attention.metadata import AttentionMetadata
from llmfw.ops.reference_state import causal_conv1d, selective_scan, ssd_scan
from recurrent_batches import BATCHES, SLOTS, batch, strided


def requests(metadata: AttentionMetadata):
    """(slot, packed tokens) of each request."""
    ends = metadata.cu_query_lens.tolist()
    for slot, begin, end in zip(metadata.state_slots.tolist(), ends, ends[1:], strict=False):
        yield slot, range(begin, end)


def assert_states(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor, metadata):
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    others = sorted(set(range(SLOTS)) - set(metadata.state_slots.tolist()))
    assert torch.equal(got[others], before[others])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv1d(name: str, silu: bool):
    torch.manual_seed(0)
    metadata, channels, taps = batch(name), 6, 4
    x, weight = torch.randn(sum(metadata.query_lens), channels), torch.randn(channels, taps)
    bias = torch.randn(channels) if silu else None
    state = strided(SLOTS, taps - 1, channels)
    before, want_state = state.clone(), state.double()
    want = torch.zeros(x.shape, dtype=torch.float64)
    for slot, tokens in requests(metadata):
        for token in tokens:
            window = torch.cat((want_state[slot], x[token : token + 1].double()))
            want[token] = (window * weight.t()).sum(0) + (0 if bias is None else bias)
            want_state[slot] = window[1:]
    got = causal_conv1d(x, weight, bias, state, metadata, silu)
    torch.testing.assert_close(got.double(), F.silu(want) if silu else want, atol=1e-5, rtol=1e-5)
    assert_states(state, want_state, before, metadata)


@pytest.mark.parametrize("name", BATCHES)
def test_selective_scan(name: str):
    torch.manual_seed(0)
    metadata, channels, width = batch(name), 6, 5
    total = sum(metadata.query_lens)
    x, dt, z = torch.randn(total, channels), 2 * torch.randn(total, channels), torch.randn(total, 6)
    b, c = torch.randn(total, width), torch.randn(total, width)
    a, d, dt_bias = -torch.rand(channels, width) * 16, torch.randn(channels), torch.randn(channels)
    state = strided(SLOTS, channels, width)
    before, want_state = state.clone(), state.double()
    step = F.softplus(dt.double() + dt_bias)
    want = torch.zeros(x.shape, dtype=torch.float64)
    for slot, tokens in requests(metadata):
        for t in tokens:
            decay = torch.exp(step[t][:, None] * a)
            want_state[slot] = decay * want_state[slot] + (step[t] * x[t])[:, None] * b[t].double()
            want[t] = want_state[slot] @ c[t].double() + d * x[t]
    got = selective_scan(x, dt, a, b, c, d, z, dt_bias, state, metadata)
    torch.testing.assert_close(got.double(), want * F.silu(z.double()), atol=1e-4, rtol=1e-4)
    assert_states(state, want_state, before, metadata)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.9)])
def test_ssd_scan(name: str, limit: tuple[float, float]):
    torch.manual_seed(0)
    metadata, heads, groups, size, width = batch(name), 6, 2, 4, 5
    total = sum(metadata.query_lens)
    x, dt = torch.randn(total, heads, size), torch.randn(total, heads)
    b, c = torch.randn(total, groups, width), torch.randn(total, groups, width)
    a, d, dt_bias = -torch.rand(heads) * 16, torch.randn(heads), torch.randn(heads)
    state = strided(SLOTS, heads, size, width)
    before, want_state = state.clone(), state.double()
    step = F.softplus(dt.double() + dt_bias).clamp(*limit)
    want = torch.zeros(x.shape, dtype=torch.float64)
    b_, c_ = (part.double().repeat_interleave(heads // groups, dim=1) for part in (b, c))
    for slot, tokens in requests(metadata):
        for t in tokens:
            decay = torch.exp(step[t] * a)[:, None, None]
            added = (step[t][:, None] * x[t])[:, :, None] * b_[t][:, None, :]
            want_state[slot] = decay * want_state[slot] + added
            want[t] = (want_state[slot] @ c_[t][:, :, None])[..., 0] + d[:, None] * x[t]
    got = ssd_scan(x, dt, a, b, c, d, dt_bias, limit, state, metadata)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    assert_states(state, want_state, before, metadata)


def test_results_have_the_inputs_dtype():
    torch.manual_seed(0)
    metadata = batch("mixed")
    total, dtype = sum(metadata.query_lens), torch.bfloat16
    x = torch.randn(total, 8, dtype=dtype)
    conv_state = torch.zeros(SLOTS, 3, 8, dtype=dtype)
    assert causal_conv1d(x, x[:8, :4], None, conv_state, metadata).dtype == dtype
    a, d, narrow = -torch.ones(8, 4), torch.ones(8), x[:, :4]
    state = torch.zeros(SLOTS, 8, 4)
    assert selective_scan(x, x, a, narrow, narrow, d, x, d, state, metadata).dtype == dtype
    state = torch.zeros(SLOTS, 2, 4, 4)
    heads, one, limit = x.unflatten(1, (2, 4)), narrow[:, None], (0.0, float("inf"))
    y = ssd_scan(heads, x[:, :2], -d[:2], one, one, d[:2], d[:2], limit, state, metadata)
    assert y.dtype == dtype
