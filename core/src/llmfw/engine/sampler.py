"""From logits to tokens, all rows at once, without waiting for the device.

top_k, top_p and min_p each come to one threshold a row; the tokens at or above the highest of them
stay (equal logits stay or go together). A row's token is found by inverting the cumulative
distribution in vocabulary order with one uniform number, so that a request's draws do not depend on
its neighbours.

On a CPU sorting and the position of the maximum go through numpy, which is 30 and 10 times as fast
there as torch, and top_p sorts only the greatest values of a row where these hold enough.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from llmfw.engine.sampling_plan import BadWords, Penalties, SamplingPlan

_ROWS_AT_ONCE = 128  # for log probabilities, to bound their memory
#: How far below a row's maximum top_p looks for its last token; if it is not there, everywhere.
_NEAR = (4.0, 9.0)
_CLEARANCE = 1e-9  # of the mass: so far apart must be what sums in another order shall not confuse


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log probabilities on the device.

    chosen, ranks: [n], of the rows' own tokens. top_ids, top_values: [n, k], best first.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def sample(logits: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """Choose one token a row.

    Args:
        logits: [rows, vocab], any floating dtype; not changed.
        plan: What each row wants.

    Returns:
        int64 [rows]; -1 where the row's logits were not finite or nothing was allowed.
    """
    if not plan.features:
        return _checked(*_best(logits))
    x = edited(logits, plan)
    best, greedy = _best(x)
    if plan.random is None:
        return _checked(best, greedy)
    assert plan.temperature is not None
    x.sub_(best[:, None]).div_(plan.temperature)  # the best is now 0
    if plan.filters:
        weights = x.exp()
        weights.mul_(x >= _threshold(x, weights, plan))
    else:
        weights = x.exp_()
    drawn = _invert(weights, plan)
    return _checked(best, torch.where(plan.random[:, 0], drawn, greedy))


def edited(logits: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """A float32 copy of the logits with logit_bias, bad words, min_tokens and penalties applied."""
    x = logits.float() if logits.dtype != torch.float32 else logits.clone()
    if plan.edits is not None:
        x.index_put_((plan.edits.rows, plan.edits.ids), plan.edits.values, accumulate=True)
    if plan.bad_words is not None:
        _forbid_bad_words(x, plan.bad_words)
    if plan.penalties is not None:
        rows = plan.penalties.rows
        x.index_copy_(0, rows, _penalised(x.index_select(0, rows), plan.penalties))
    return x


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> LogprobTensors:
    """Log probabilities of `tokens` [n] under `logits` [n, vocab], and of the `count` best ones."""
    parts = []
    for rows, own in zip(logits.split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True):
        values = rows.float().log_softmax(dim=-1)
        chosen = values.gather(1, own.clamp_min(0)[:, None])
        ranks = (values > chosen).sum(dim=-1) + 1
        top_values, top_ids = values.topk(min(count, values.shape[-1]), dim=-1)
        parts.append((chosen[:, 0], ranks, top_ids, top_values))
    return LogprobTensors(*(torch.cat(part) for part in zip(*parts, strict=True)))


def beam_candidates(
    logits: torch.Tensor, plan: SamplingPlan, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best next tokens of each beam and their log probabilities, best first.

    What the plan changes it changes in the log probabilities, which are not normalised again, as in
    transformers' beam search. logits: [beams, vocab]. Returns int64 and float32 [beams, count].
    """
    scores = edited(logits.float().log_softmax(dim=-1), plan)
    best = scores.topk(count, dim=-1)
    return best.indices, best.values


def _best(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each row and its first position; NaN counts as the greatest."""
    if x.device.type != "cpu":
        best = x.max(dim=-1)
        return best.values, best.indices
    wide = x.float()
    index = torch.from_numpy(wide.numpy().argmax(axis=-1))
    return wide.gather(1, index[:, None])[:, 0], index


def _descending(x: torch.Tensor) -> torch.Tensor:
    """The rows' values, greatest first."""
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)


def _checked(best: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(~best.isfinite(), -1)


def _forbid_bad_words(x: torch.Tensor, words: BadWords) -> None:
    complete = ((words.history == words.prefix) | (words.prefix == -1)).all(dim=-1)
    values = torch.zeros_like(complete, dtype=x.dtype).masked_fill_(complete, float("-inf"))
    x.index_put_((words.rows, words.last), values, accumulate=True)


def _penalised(x: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    index = torch.arange(penalties.history.shape[1], device=x.device)
    written = index < penalties.lens
    # Places past the end name the first token, which is seen anyway.
    ids = torch.where(written, penalties.history, penalties.history[:, :1])
    seen = x.gather(1, ids)
    stretched = torch.where(seen > 0, seen / penalties.repetition, seen * penalties.repetition)
    x.scatter_(1, ids, stretched)
    if penalties.counted:
        output = (written & (index >= penalties.prompt_lens)).to(x.dtype)
        counts = torch.zeros_like(x).scatter_add_(1, ids, output)
        x -= penalties.frequency * counts
        x -= penalties.presence * (counts > 0)
    return x


def _threshold(x: torch.Tensor, weights: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """The logit below which tokens go, [rows, 1]; x [rows, vocab] has its maximum at 0.

    weights: exp(x).
    """
    limits = []
    if plan.top_p is not None and not plan.top_k_everywhere and x.device.type == "cpu":
        limits.append(_row_thresholds(x, weights, plan))
    else:
        limits += _sorted_thresholds(x, plan)
    if plan.min_p is not None:
        limits.append(plan.min_p.log())  # of 0: -inf
    return functools.reduce(torch.maximum, limits)


def _sorted_thresholds(x: torch.Tensor, plan: SamplingPlan) -> list[torch.Tensor]:
    """Those of top_k and of top_p, from the sorted rows."""
    thresholds = []
    if plan.top_p is not None and not plan.top_k_everywhere:
        best = _descending(x)
    elif plan.top_k is not None:
        best = x.topk(min(plan.max_top_k, x.shape[-1]), dim=-1).values
    if plan.top_k is not None:
        kth = best.gather(1, (plan.top_k.clamp_max(best.shape[-1]) - 1).clamp_min_(0))
        thresholds.append(kth.masked_fill_(plan.top_k == 0, float("-inf")))
    if plan.top_p is not None:
        thresholds.append(_nucleus_threshold(best, plan.top_p, plan.top_k))
    return thresholds


def _row_thresholds(x: torch.Tensor, weights: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """The same row by row, without sorting a whole row where a part of it is enough."""
    assert plan.top_p is not None
    masses = weights.sum(dim=-1, dtype=torch.float64).tolist()
    top_ps = plan.top_p[:, 0].tolist()
    top_ks = [0] * len(x) if plan.top_k is None else plan.top_k[:, 0].tolist()
    thresholds = []
    for row, (top_p, top_k, mass) in enumerate(zip(top_ps, top_ks, masses, strict=True)):
        values = x[row : row + 1]
        if top_k:
            best = values.topk(min(top_k, x.shape[-1]), dim=-1).values
            found = max(float(best[0, -1]), _last_of_nucleus(best, plan.top_p[row : row + 1]))
        elif top_p >= 1.0:
            found = -math.inf
        else:
            near = _near_nucleus(values[0].numpy(), top_p * mass, mass)
            if near is None:
                near = _last_of_nucleus(_descending(values), plan.top_p[row : row + 1])
            found = near
        thresholds.append(found)
    return torch.tensor(thresholds, dtype=x.dtype)[:, None]


def _last_of_nucleus(best: torch.Tensor, top_p: torch.Tensor) -> float:
    return float(_nucleus_threshold(best, top_p, None))


def _near_nucleus(row: np.ndarray, wanted: float, mass: float) -> float | None:
    """The value at which the sorted row reaches `wanted` of its mass, looking near its maximum 0.

    None if it is further away, or so near to a neighbour's sum that rounding could decide.
    """
    for distance in _NEAR:
        values = row[row > -distance]
        values[::-1].sort()  # greatest first
        reached = torch.from_numpy(values).exp().cumsum(dim=-1, dtype=torch.float64).numpy()
        place = int(np.searchsorted(reached, wanted))
        if place == len(reached):
            continue
        before = reached[place - 1] if place else 0.0
        if min(reached[place] - wanted, wanted - before) < _CLEARANCE * mass:
            return None
        return float(values[place])
    return None


def _nucleus_threshold(
    best: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor | None
) -> torch.Tensor:
    """The last value that top_p keeps of sorted rows, of whose mass only top_k's part counts."""
    weights = best.exp()
    if top_k is not None:
        index = torch.arange(best.shape[-1], device=best.device)
        weights.mul_((index < top_k) | (top_k == 0))
    reached = weights.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(reached, reached[:, -1:] * top_p)
    last = best.gather(1, index.clamp_max_(best.shape[-1] - 1))
    return last.masked_fill_(top_p >= 1.0, float("-inf"))


def _invert(weights: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """The first token whose cumulative weight exceeds uniform * total; weights [rows, vocab]."""
    assert plan.uniform is not None
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = cumulative[:, -1:] * plan.uniform
    index = torch.searchsorted(cumulative, wanted, right=True)
    return index[:, 0].clamp_max_(weights.shape[-1] - 1)
