"""The torch references of recurrent layers: a short convolution, two scans, the norm behind them.

Convolution and scans continue the requests' state, found by `metadata.state_slots`, and leave it
after the last token. Prompts are cut into pieces that are computed side by side, so there is no
loop over tokens.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata

_LONGEST_PIECE = 64


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    metadata: AttentionMetadata,
    silu: bool = True,
) -> torch.Tensor:
    """Each channel's weighted sum of a token and the K - 1 before it, then silu.

    Args:
        x: [T, channels].
        weight: [channels, K], the last column for the token itself.
        bias: [channels] or None.
        state: [slots, K - 1, channels], the inputs before these; written.
        metadata: The batch.
        silu: Whether silu is applied.

    Returns:
        [T, channels]. Computed in float32.
    """
    slots, taps = _slots(metadata), weight.shape[1]
    past = state.index_select(0, slots)  # [requests, K - 1, channels]
    if metadata.max_query_len == 1:
        window = torch.cat((past, x[:, None].to(past.dtype)), dim=1)  # [requests, K, channels]
        out = (window.float() * weight.t().float()).sum(1)
        state.index_copy_(0, slots, window[:, 1:])
    else:
        # Every request's past stands before its tokens, in one sequence.
        lens = np.array(metadata.query_lens)
        ends = np.cumsum(lens + taps - 1)
        owner = np.repeat(np.arange(len(lens)), lens)
        own = np.arange(len(x)) + (owner + 1) * (taps - 1)  # [T], where the tokens stand
        before = (ends - lens - taps + 1)[:, None] + np.arange(taps - 1)
        after = ends[:, None] - np.arange(taps - 1, 0, -1)  # what the next step needs
        places, before_, after_ = _indices(x.device, own, before, after)
        joined = x.new_empty(int(ends[-1]), x.shape[1], dtype=past.dtype)
        joined[places] = x.to(past.dtype)
        joined[before_] = past.flatten(0, 1)
        state.index_copy_(0, slots, joined[after_].view_as(past))
        out = torch.zeros_like(x, dtype=torch.float32)
        for tap in range(taps):
            out.addcmul_(joined[places - (taps - 1 - tap)].float(), weight[:, tap].float())
    if bias is not None:
        out = out + bias.float()
    return (F.silu(out) if silu else out).to(x.dtype)


def selective_scan(
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
    """A diagonal state space for each channel, whose step size and in- and output follow the token.

    h = exp(dt a) h + dt b x;  y = (c h + d x) silu(z), with dt = softplus(dt + dt_bias)
    (arXiv:2312.00752, algorithm 2).

    Args:
        x, dt, z: [T, channels].
        a: float32 [channels, N], negative.
        b, c: [T, N].
        d, dt_bias: float32 [channels].
        state: float32 [slots, channels, N], h; written.
        metadata: The batch.

    Returns:
        [T, channels]. Computed in float32.
    """
    results = [
        _selective_scan(
            x[part], dt[part], a, b[part], c[part], d, z[part], dt_bias, state, slots, lens
        )
        for part, slots, lens in _parts(metadata)
    ]
    return torch.cat(results) if len(results) > 1 else results[0]


def _selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    lens: tuple[int, ...],
) -> torch.Tensor:
    pieces = _Pieces(lens, isqrt(max(lens) - 1) + 1, x.device)
    inputs, step = x.float(), F.softplus(dt.float() + dt_bias)
    steps = pieces.split(step).unsqueeze(-1)  # [pieces, length, channels, 1]; 0 where padded
    values = pieces.split(step * inputs).unsqueeze(-1)
    ins = pieces.split(b.float()).unsqueeze(2)  # [pieces, length, 1, N]
    outs = pieces.split(c.float()).unsqueeze(-1)  # [pieces, length, N, 1]
    begin = state.index_select(0, slots)
    if pieces.most > 1:  # what each piece starts with follows from what those before it add
        own = torch.zeros(len(steps), *a.shape, device=x.device)  # [pieces, channels, N]
        for i in range(pieces.length):
            own = torch.exp(steps[:, i] * a).mul_(own).addcmul_(values[:, i], ins[:, i])
        begin, end = pieces.chain(begin, torch.exp(steps.sum(1) * a), own)
    hidden, results = begin, []
    for i in range(pieces.length):
        hidden = torch.exp(steps[:, i] * a).mul_(hidden).addcmul_(values[:, i], ins[:, i])
        results.append((hidden @ outs[:, i]).squeeze(-1))
    state.index_copy_(0, slots, hidden if pieces.most == 1 else end)
    y = pieces.join(torch.stack(results, dim=1)) + d * inputs
    return (y * F.silu(z.float())).to(x.dtype)


def ssd_scan(
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
    """A state space with one decay a head, by products within pieces of the sequence.

    h = exp(dt a) h + dt x b^T;  y = h c + d x, with dt = softplus(dt + dt_bias) in dt_limit
    (arXiv:2405.21060, section 6).

    Args:
        x: [T, heads, P].
        dt: [T, heads].
        a: float32 [heads], negative.
        b, c: [T, groups, N], shared by heads / groups heads each.
        d, dt_bias: float32 [heads].
        dt_limit: Least and greatest step size.
        state: float32 [slots, heads, P, N], h; written.
        metadata: The batch.

    Returns:
        [T, heads, P]. Computed in float32.
    """
    results = [
        _ssd_scan(x[part], dt[part], a, b[part], c[part], d, dt_bias, dt_limit, state, slots, lens)
        for part, slots, lens in _parts(metadata)
    ]
    return torch.cat(results) if len(results) > 1 else results[0]


def _ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    state: torch.Tensor,
    slots: torch.Tensor,
    lens: tuple[int, ...],
) -> torch.Tensor:
    each = x.shape[1] // b.shape[1]
    inputs, step = x.float(), F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    if max(lens) == 1:  # one update, without the products that pieces are for
        kept = torch.exp(step * a)[..., None, None] * state.index_select(0, slots)
        b, c = (part.float().repeat_interleave(each, dim=1) for part in (b, c))
        hidden = kept.addcmul_((step[..., None] * inputs)[..., None], b[:, :, None])
        state.index_copy_(0, slots, hidden)
        y = (hidden @ c[..., None]).squeeze(-1)  # [requests, heads, P]
        return (y + d[:, None] * inputs).to(x.dtype)
    pieces = _Pieces(lens, _LONGEST_PIECE, x.device)
    decay = pieces.split(step * a).double().cumsum(1).transpose(1, 2)  # [pieces, heads, length]
    values = pieces.split(step[:, :, None] * inputs).transpose(1, 2)  # [pieces, heads, length, P]
    ins = pieces.split(b.float()).transpose(1, 2)  # [pieces, groups, length, N]
    outs = pieces.split(c.float()).transpose(1, 2)

    # From token to token within a piece; differences of sums, hence the double precision.
    later = torch.ones(pieces.length, pieces.length, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf"))
    weights = between.float().exp_().unflatten(1, (-1, each))
    weights = weights.mul_((outs @ ins.transpose(2, 3)).unsqueeze(2)).flatten(1, 2)
    y = weights @ values  # [pieces, heads, length, P]

    # What each piece leaves, what each starts with, and what that adds to its tokens.
    left = torch.exp(decay[..., -1:] - decay).float().unsqueeze(-1) * values
    ins, outs = (part.repeat_interleave(each, dim=1) for part in (ins, outs))
    own = left.transpose(2, 3) @ ins  # [pieces, heads, P, N]
    whole = decay[..., -1, None, None].exp().float()  # [pieces, heads, 1, 1]
    begin, end = pieces.chain(state.index_select(0, slots), whole, own)
    y += (outs @ begin.transpose(2, 3)) * decay.exp().float().unsqueeze(-1)
    state.index_copy_(0, slots, end)
    return (pieces.join(y.transpose(1, 2)) + d[:, None] * inputs).to(x.dtype)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, groups: int = 1
) -> torch.Tensor:
    """RMS norm of x silu(gate), each of `groups` equal parts of the features by itself.

    x, gate: [T, hidden]. weight: [hidden]. Computed in float32; the normalised value is rounded to
    x's dtype before the product with weight.
    """
    gated = (x.float() * F.silu(gate.float())).unflatten(-1, (groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(1)
    return normed.to(x.dtype) * weight


class _Pieces:
    """Packed requests cut into pieces of one length, the last of each padded with zeros.

    Args:
        query_lens: Tokens of each request.
        longest: Most tokens of a piece.
        device: Where the tensors are.
    """

    def __init__(self, query_lens: tuple[int, ...], longest: int, device: torch.device) -> None:
        self.length = min(max(query_lens), longest)
        self.most = -(-max(query_lens) // self.length)  # pieces of a request
        self._single = max(query_lens) == 1
        if self._single:  # nothing to cut, and nothing that only the host knows
            return
        lens = np.array(query_lens)
        self._counts = -(-lens // self.length)
        self._first = np.cumsum(self._counts) - self._counts
        owner = np.repeat(np.arange(len(lens)), self._counts)  # [pieces]
        begin = (np.arange(len(owner)) - self._first[owner]) * self.length
        within = begin[:, None] + np.arange(self.length)  # [pieces, length], place in the request
        valid = within < lens[owner, None]
        tokens = np.where(valid, within + (np.cumsum(lens) - lens)[owner, None], 0)
        self._tokens, self._places = _indices(device, tokens, np.flatnonzero(valid))
        self._padding = torch.from_numpy(~valid).to(device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [pieces, length, ...]."""
        if self._single:
            return x.unsqueeze(1)
        cut = x[self._tokens].unflatten(0, (-1, self.length))
        padding = self._padding.view(*self._padding.shape, *[1] * (cut.ndim - 2))
        return cut.masked_fill_(padding, 0)  # type: ignore[no-any-return]

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[pieces, length, ...] -> [T, ...]."""
        return x.squeeze(1) if self._single else x.flatten(0, 1)[self._places]

    def chain(
        self, begin: torch.Tensor, decay: torch.Tensor, own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State of the pieces at their begin, and of the requests after their last.

        Args:
            begin: Of the requests: [requests, ...].
            decay: What remains of a state after a piece, a factor: [pieces, ...].
            own: What a piece adds: [pieces, ...].
        """
        if self.most == 1:
            return begin, begin * decay + own
        begins, end = torch.empty_like(own), begin.clone()
        for number in range(self.most):
            going = np.flatnonzero(self._counts > number)
            requests, pieces = _indices(own.device, going, self._first[going] + number)
            before = end[requests]
            begins[pieces] = before
            end[requests] = before * decay[pieces] + own[pieces]
        return begins, end


def _parts(
    metadata: AttentionMetadata,
) -> list[tuple[slice, torch.Tensor, tuple[int, ...]]]:
    """Context and generation requests apart, lest the latter be padded: tokens, slots, lengths."""
    slots, lens, first = _slots(metadata), metadata.query_lens, metadata.num_contexts
    if not 0 < first < len(lens):
        return [(slice(None), slots, lens)]
    tokens = metadata.num_context_tokens
    contexts = (slice(tokens), slots[:first], lens[:first])
    return [contexts, (slice(tokens, None), slots[first:], lens[first:])]


def _slots(metadata: AttentionMetadata) -> torch.Tensor:
    assert metadata.state_slots is not None, "the batch has no slots for recurrent state"
    return metadata.state_slots


def _indices(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array.reshape(-1).astype(np.int64)).to(device) for array in arrays]
