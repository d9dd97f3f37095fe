"""From logits to tokens, all rows at once, without waiting for the device.

top_k, top_p and min_p each come to one threshold a row; the tokens at or above the highest of them
stay (equal logits stay or go together). A row's token is found by inverting the cumulative
distribution in vocabulary order with one uniform number, so that a request's draws do not depend on
its neighbours.

On a CPU sorting and the position of the maximum go through numpy, which is 30 and 10 times as fast
there as torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmfw.engine.sampling_plan import BadWords, Penalties, SamplingPlan

_ROWS_AT_ONCE = 128  # for log probabilities, to bound their memory


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
    threshold = _threshold(x, plan)
    if threshold is None:
        weights = x.exp_()
    else:
        kept = x >= threshold
        weights = x.exp_().mul_(kept)
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


def _threshold(x: torch.Tensor, plan: SamplingPlan) -> torch.Tensor | None:
    """The logit below which tokens go, [rows, 1]; x [rows, vocab] has its maximum at 0."""
    width = min(plan.max_top_k, x.shape[-1])
    if plan.top_k is not None and (plan.top_p is None or plan.top_k_everywhere):
        best = x.topk(width, dim=-1).values
    elif plan.top_p is not None:
        best = _descending(x)
    threshold = None
    if plan.top_k is not None:
        kth = best.gather(1, (plan.top_k.clamp_max(best.shape[-1]) - 1).clamp_min_(0))
        threshold = kth.masked_fill_(plan.top_k == 0, float("-inf"))
    if plan.top_p is not None:
        nucleus = _nucleus_threshold(best, plan.top_p, plan.top_k)
        threshold = nucleus if threshold is None else torch.maximum(threshold, nucleus)
    if plan.min_p is not None:
        least = plan.min_p.log()  # of 0: -inf
        threshold = least if threshold is None else torch.maximum(threshold, least)
    return threshold


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
