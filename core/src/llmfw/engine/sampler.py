"""From logits to tokens, all rows at once, without waiting for the device.

What is asked of single rows becomes arguments of three ops: `penalise` changes logits, `argmax`
finds the best token, `draw_tokens` draws one. A request's draws depend on its logits, its seed and
the position alone, neither on its neighbours nor on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmfw.engine.sampling_plan import BadWords, SamplingPlan
from llmfw.ops import DeviceInfo, OpTable

ROWS_AT_ONCE = 128  # for log probabilities, to bound their memory


class Places(NamedTuple):
    """Where chosen tokens go: tokens[places[row]] of a flat int32 table, places int64 [rows]."""

    tokens: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log probabilities on the device.

    chosen, ranks: [n], of the rows' own tokens. top_ids, top_values: [n, k], best first.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def sample(
    logits: torch.Tensor,
    plan: SamplingPlan,
    ops: OpTable | None = None,
    into: Places | None = None,
    best: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose one token a row.

    Args:
        logits: [rows, vocab], any floating dtype; not changed.
        plan: What each row wants.
        ops: Finds the kernels; the references when left out.
        into: Where the tokens are stored, as 0 where there is none.
        best: The rows' `argmax` where it is known and the plan changes no logits.

    Returns:
        int64 [rows]; -1 where the row's logits were not finite or nothing was allowed.
    """
    ops = ops or _references(logits.device)
    x = edited(logits, plan, ops) if plan.changes_logits else logits
    facts = {"vocab_size": x.shape[-1]}
    places = (None, None) if into is None else into
    if plan.parameters is None:
        return ops.resolve("argmax", x.dtype, **facts)(x, *places)  # type: ignore[no-any-return]
    if best is None:
        best = ops.resolve("argmax", x.dtype, **facts)(x)
    draw = ops.resolve("draw_tokens", x.dtype, **facts)
    return draw(x, best, plan.parameters, plan.cuts, *places)  # type: ignore[no-any-return]


def edited(logits: torch.Tensor, plan: SamplingPlan, ops: OpTable | None = None) -> torch.Tensor:
    """A float32 copy of the logits with logit_bias, bad words, min_tokens and penalties applied."""
    x = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
    if plan.edits is not None:
        _add_at(x, plan.edits.rows, plan.edits.ids, plan.edits.values)
    if plan.bad_words is not None:
        _forbid_bad_words(x, plan.bad_words)
    if plan.penalties is not None:
        penalise = (ops or _references(x.device)).resolve("penalise", x.dtype)
        one = plan.penalties
        parts = (one.rows, one.sequences, one.tokens, one.lens, one.prompt_lens, one.strengths)
        penalise(x, *parts, one.longest)
    return x


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> LogprobTensors:
    """Log probabilities of `tokens` [n] under `logits` [n, vocab], and of the `count` best ones."""
    parts = []
    for rows, own in zip(logits.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True):
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


def _references(device: torch.device) -> OpTable:
    return OpTable(DeviceInfo(device, frozenset()), select="reference")


def _add_at(x: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
    """Add values to x[rows, ids]; the same place may be named several times."""
    x.view(-1).index_add_(0, rows * x.shape[-1] + ids, values)


def _forbid_bad_words(x: torch.Tensor, words: BadWords) -> None:
    complete = ((words.history == words.prefix) | (words.prefix == -1)).all(dim=-1)
    values = torch.zeros_like(complete, dtype=x.dtype).masked_fill_(complete, float("-inf"))
    _add_at(x, words.rows, words.last, values)
