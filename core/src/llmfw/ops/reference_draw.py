"""The torch reference of `draw_tokens`: temperature, top_k, top_p, min_p and a seeded draw.

A token counts by its distance below the row's greatest, in octaves of probability, and by a mass
that is a whole number. Sums of whole numbers do not depend on their order, and each product and sum
that leads to them is rounded by itself, so every device gives the same token for the same number.
"""

from __future__ import annotations

import numpy as np
import torch

#: A mass is 2^(FULL - octaves), to 22 bits; so there is none from FULL + 1 octaves on.
FULL = 40
#: Distances are in units of so many octaves, and at most 1.
UNIT = 64
_STEPS = 32  # of an octave
#: 2^x for x from -1/64 to 1/64 within 6e-8: 1 + x (slope + x square); float32 numbers.
_SLOPE, _SQUARE = 0.6931573152542114, 0.24022650718688965
_NUMBERS_AT_ONCE = 1 << 17  # on a CPU, so that they stay in its cache


def draw_tokens(
    logits: torch.Tensor,
    best: torch.Tensor,
    parameters: torch.Tensor,
    cuts: bool,
    tokens: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a row, drawn from those that top_k, top_p and min_p leave.

    Equal logits stay or go together. A row's token follows from its logits and parameters alone.

    Args:
        logits: [rows, vocab].
        best: int64 [rows], the row's `argmax`; where it is -1 so is the result.
        parameters: float64 [5, rows]. scale: log2(e) / temperature, a float32 number; 0 takes the
            best. top_k: so many are kept, 0 for all. top_p: of the mass of these so much is kept,
            1 for all. farthest: greatest distance kept, -log2(min_p), a float32 number. uniform: in
            [0, 1); the first token is taken with which the mass, in the order of the vocabulary,
            exceeds this part of all that is kept.
        cuts: Whether top_k or top_p is set in some row.
        tokens, places: int32 (flat) and int64 [rows]: max(result, 0) is stored in tokens[places].

    Returns:
        int64 [rows].
    """
    parts = logits.shape[0]
    if logits.device.type == "cpu":
        parts = max(1, _NUMBERS_AT_ONCE // logits.shape[1])
    drawn = [
        _draw(*each, cuts)
        for each in zip(
            logits.split(parts), best.split(parts), parameters.split(parts, dim=1), strict=True
        )
    ]
    found = torch.cat(drawn) if drawn else best
    if tokens is not None and places is not None:
        tokens.index_copy_(0, places, found.clamp_min(0).int())
    return found


def _draw(
    logits: torch.Tensor, best: torch.Tensor, parameters: torch.Tensor, cuts: bool
) -> torch.Tensor:
    scale, top_k, top_p, farthest, uniform = parameters.unsqueeze(-1)  # [rows, 1] each
    greatest = logits.gather(1, best.clamp_min(0)[:, None]).float()
    distance = (
        (greatest - logits.float()).mul_(scale.float() / UNIT).clamp_max_(1.0)
    )  # [rows, vocab]
    distance.masked_fill_(((best < 0)[:, None]) | (scale == 0), 0)
    limit = farthest.float() / UNIT
    if cuts:
        limit = torch.minimum(limit, _limit(distance, top_k.long(), top_p))
    reached = masses(distance).masked_fill_(distance > limit, 0).cumsum(-1)
    every = reached[:, -1:]
    wanted = torch.minimum((every.double() * uniform).long(), every - 1)
    drawn = torch.searchsorted(reached, wanted, right=True)
    return torch.where((scale == 0) | (best < 0)[:, None], best[:, None], drawn)[:, 0]


def masses(distance: torch.Tensor) -> torch.Tensor:
    """The mass of tokens that are so far below the best (float32, from 0 to 1, in UNITs): int64."""
    near = distance * UNIT
    steps = (near * _STEPS).round_()
    x = (steps / _STEPS).sub_(near)
    power = (x * _SQUARE).add_(_SLOPE).mul_(x).add_(1.0)
    powers = torch.arange(UNIT * _STEPS + 1, device=distance.device).double().div_(-_STEPS).exp2_()
    power.mul_(powers.float().take(steps.long()))
    return power.double().mul_(1 << FULL).round_().long()


def _sorted(x: torch.Tensor) -> torch.Tensor:
    """The rows' values, least first; through numpy on a CPU, which is 20 times as fast there."""
    if x.device.type != "cpu":
        return x.sort(dim=-1).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1))


def _limit(distance: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The greatest distance that top_k, and top_p of what that keeps, leave: [rows, 1]."""
    near = _sorted(distance)
    vocab = near.shape[-1]
    kth = near.gather(1, top_k.clamp(1, vocab) - 1).masked_fill_(top_k == 0, float("inf"))
    index = torch.arange(vocab, device=near.device)
    counted = masses(near).mul_((index < top_k) | (top_k == 0))
    reached = counted.cumsum(-1)
    every = reached[:, -1:]
    wanted = torch.minimum((every.double() * top_p).ceil_().long().clamp_min_(1), every)
    last = near.gather(1, torch.searchsorted(reached, wanted))
    return torch.minimum(kth, last.masked_fill_(top_p >= 1.0, float("inf")))


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    sequences: torch.Tensor,
    tokens: torch.Tensor,
    lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    strengths: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Make tokens that a sequence has less probable, in place; returns the logits.

    Args:
        logits: float32 [rows, vocab], written.
        rows: int64 [n], the rows of logits that have penalties; none twice.
        sequences: int64 [n], their sequences' rows of tokens.
        tokens: int32 [all sequences, width].
        lens, prompt_lens: int64 [n], at least 1: tokens of each, and how many are the prompt's.
        strengths: float32 [3, n]. repetition: logits of all tokens there are divided (positive) or
            multiplied by it. presence and frequency: subtracted from those of the output, once and
            for each time.
        longest: At least every length.
    """
    repetition, presence, frequency = strengths.unsqueeze(-1)  # [n, 1] each
    history = tokens[:, :longest].index_select(0, sequences).long()
    index = torch.arange(history.shape[1], device=logits.device)
    written = index < lens[:, None]
    # Places past the end name the first token: what is written there is the same every time.
    ids = torch.where(written, history, history[:, :1])
    output = (written & (index >= prompt_lens[:, None])).to(logits.dtype)
    counts = (
        logits.new_zeros(len(rows), logits.shape[1]).scatter_add_(1, ids, output).gather(1, ids)
    )
    x = logits[rows[:, None], ids]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x.sub_(frequency * counts).sub_(presence * (counts > 0))
    return logits.index_put_((rows[:, None], ids), x)
