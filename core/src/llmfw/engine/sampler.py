"""From logits to tokens, all rows at once, without waiting for the device.

top_k, top_p and min_p each come to one threshold a row; the tokens at or above the highest of them stay (equal logits
stay or go together). A row's token is found by inverting the cumulative distribution in vocabulary order with one
uniform number, so that a request's draws do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.engine.sampling_plan import BadWords, Penalties, SamplingPlan

#: top_p looks for its threshold among so many best tokens before it sorts the whole vocabulary (CPU).
NUCLEUS_CANDIDATES = 256
_ROWS_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log probabilities on the device: of the rows' own tokens [n], ranks [n], best ids and values [n, k]."""

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
        return _checked(*logits.max(dim=-1))
    x = edited(logits, plan)
    best, greedy = x.max(dim=-1)
    if plan.random is None:
        return _checked(best, greedy)
    assert plan.temperature is not None
    x.sub_(best[:, None]).div_(plan.temperature)  # the best is now 0
    threshold = _threshold(x, plan)
    if threshold is not None:
        x.masked_fill_(x < threshold, float("-inf"))
    drawn = _invert(x.exp_(), plan)
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
    """Log probabilities of `tokens` [n] under `logits` [n, vocab], and those of the `count` best tokens."""
    parts = []
    for rows, own in zip(logits.split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True):
        values = rows.float().log_softmax(dim=-1)
        chosen = values.gather(1, own.clamp_min(0)[:, None])
        ranks = (values > chosen).sum(dim=-1) + 1
        top_values, top_ids = values.topk(min(count, values.shape[-1]), dim=-1)
        parts.append((chosen[:, 0], ranks, top_ids, top_values))
    return LogprobTensors(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _checked(best: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(~best.isfinite(), -1)


def _forbid_bad_words(x: torch.Tensor, words: BadWords) -> None:
    complete = ((words.history == words.prefix) | (words.prefix == -1)).all(dim=-1)
    values = torch.zeros_like(complete, dtype=x.dtype).masked_fill_(complete, float("-inf"))
    x.index_put_((words.rows, words.last), values, accumulate=True)


def _penalised(x: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    history = penalties.history
    index = torch.arange(history.shape[1], device=x.device)
    written = index < penalties.lens
    output = (written & (index >= penalties.prompt_lens)).to(x.dtype)
    ids = torch.where(
        written, history, history[:, :1]
    )  # past the end: the first token, seen anyway
    seen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ids, True)
    counts = torch.zeros_like(x).scatter_add_(1, ids, output)
    stretched = torch.where(x > 0, x / penalties.repetition, x * penalties.repetition)
    x = torch.where(seen, stretched, x)
    return x - penalties.frequency * counts - penalties.presence * (counts > 0)


def _threshold(x: torch.Tensor, plan: SamplingPlan) -> torch.Tensor | None:
    """The logit below which tokens go, [rows, 1]; x [rows, vocab] has its maximum at 0."""
    threshold = None
    if plan.top_k is not None:
        width = min(plan.max_top_k, x.shape[-1])
        best = x.topk(width, dim=-1).values
        kth = best.gather(1, (plan.top_k.clamp_max(width) - 1).clamp_min(0))
        threshold = kth.masked_fill_(plan.top_k == 0, float("-inf"))
    if plan.top_p is not None:
        nucleus = _nucleus_threshold(x, plan.top_p, threshold)
        threshold = nucleus if threshold is None else torch.maximum(threshold, nucleus)
    if plan.min_p is not None:
        least = plan.min_p.log()  # of 0: -inf
        threshold = least if threshold is None else torch.maximum(threshold, least)
    return threshold


def _nucleus_threshold(
    x: torch.Tensor, top_p: torch.Tensor, floor: torch.Tensor | None
) -> torch.Tensor:
    """The logit of the last token that top_p keeps, among those at or above `floor`."""
    weights = x.exp()
    if floor is not None:
        weights.masked_fill_(x < floor, 0.0)
    wanted = weights.sum(dim=-1, keepdim=True, dtype=torch.float64) * top_p
    off = top_p >= 1.0
    if x.device.type == "cpu":
        best = x.topk(min(NUCLEUS_CANDIDATES, x.shape[-1]), dim=-1).values
        reached = best.exp().cumsum(dim=-1, dtype=torch.float64)
        if bool(((reached[:, -1:] >= wanted) | off).all()):
            return _first_reaching(best, reached, wanted).masked_fill_(off, float("-inf"))
    best = x.sort(dim=-1, descending=True).values
    reached = best.exp().cumsum(dim=-1, dtype=torch.float64)
    return _first_reaching(best, reached, wanted).masked_fill_(off, float("-inf"))


def _first_reaching(
    best: torch.Tensor, reached: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    index = torch.searchsorted(reached, wanted)
    return best.gather(1, index.clamp_max_(best.shape[-1] - 1))


def _invert(weights: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """The first token whose cumulative weight exceeds uniform * total; weights [rows, vocab] >= 0."""
    assert plan.uniform is not None
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = cumulative[:, -1:] * plan.uniform
    index = torch.searchsorted(cumulative, wanted, right=True)
    return index[:, 0].clamp_max_(weights.shape[-1] - 1)
