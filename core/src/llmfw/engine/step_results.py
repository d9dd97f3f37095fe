"""What a step gives beside its tokens: log probabilities, beams' candidates, logits.

Gathered on the device when the step is launched, read by the host when its output is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from llmfw.engine.batch import Batch, upload
from llmfw.engine.request_table import Feature, RequestTable
from llmfw.engine.sampler import LogprobTensors, beam_candidates, logprobs
from llmfw.engine.sampling_plan import SamplingPlan, plan_sampling
from llmfw.engine.step import Candidates, StepOutput, TokenLogprobs


class PromptRows(NamedTuple):
    """Of one sequence's prompt, from the token at `start` on: what was asked for."""

    seq_id: int
    start: int
    logprobs: LogprobTensors | None
    logits: torch.Tensor | None  # float32 [tokens, vocab]


class CandidateRows(NamedTuple):
    """Candidates of some sequences: ids int64 and log probabilities [n, most wanted]."""

    seq_ids: tuple[int, ...]
    counts: tuple[int, ...]
    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Extras:
    """What requests of a step want beside tokens; a part that none wants is None.

    logprobs: of all sequences' tokens, and for each how many are wanted (-1: all; None: none).
    candidates: of beams. logits: of some sequences, float32 [n, vocab].
    """

    logprobs: LogprobTensors | None = None
    counts: tuple[int | None, ...] = ()
    candidates: CandidateRows | None = None
    logits: tuple[tuple[int, ...], torch.Tensor] | None = None


NOTHING = Extras()


def gather_extras(
    table: RequestTable,
    seq_ids: tuple[int, ...],
    rows: np.ndarray,
    positions: np.ndarray,
    plan: SamplingPlan,
    logits: torch.Tensor,
    tokens: torch.Tensor,
) -> Extras:
    """What the sequences in `rows` of the table want of their logits [rows, vocab] and tokens."""
    if not plan.features & (Feature.LOGPROBS | Feature.BEAM | Feature.LOGITS):
        return NOTHING
    best, counts = None, plan.logprobs or ()
    if counts:
        best = logprobs(logits, tokens, widest(counts, logits.shape[-1]))
    candidates = kept = None
    if plan.features & Feature.BEAM:
        candidates = _candidates(table, seq_ids, rows, positions, logits)
    if plan.features & Feature.LOGITS:
        which = np.flatnonzero(table.features[rows] & Feature.LOGITS)
        # A copy always: the next replay of a graph writes its logits where these are.
        kept = (_ids(seq_ids, which), _select(logits, which).to(torch.float32, copy=True))
    return Extras(best, counts, candidates, kept)


def gather_prompt(
    table: RequestTable, batch: Batch, logits: torch.Tensor
) -> tuple[PromptRows, ...]:
    """What is wanted of prompts, from the rows of `logits` that follow the sampled ones."""
    results = []
    offset = 0
    for seq_id, start, count in batch.prompt_rows:
        row = table.row_of[seq_id]
        extras = table.extras[row]
        assert extras is not None
        sampling = extras.new.sampling
        own = logits[offset : offset + count]
        best = None
        if sampling.prompt_logprobs is not None:
            last = int(table.prompt_lens[row])
            tokens = table.tokens[row, start + 1 : min(start + 1 + count, last)].long()
            width = widest((sampling.prompt_logprobs,), own.shape[-1])
            best = logprobs(own[: len(tokens)], tokens, width)
        kept = own.float() if sampling.return_context_logits else None
        results.append(PromptRows(seq_id, start, best, kept))
        offset += count
    return tuple(results)


def widest(wanted: tuple[int | None, ...], vocab: int) -> int:
    """The largest of these counts; -1 stands for the whole vocabulary, None for none."""
    return max(vocab if count == -1 else count or 0 for count in wanted)


def _candidates(
    table: RequestTable,
    seq_ids: tuple[int, ...],
    rows: np.ndarray,
    positions: np.ndarray,
    logits: torch.Tensor,
) -> CandidateRows:
    which = np.flatnonzero(table.features[rows] & Feature.BEAM)
    beams = rows[which]
    counts = tuple(min(int(n), logits.shape[-1]) for n in table.num_candidates[beams])
    plan = plan_sampling(table, beams, positions[which])
    ids, values = beam_candidates(_select(logits, which), plan, max(counts))
    return CandidateRows(_ids(seq_ids, which), counts, ids, values)


def _select(logits: torch.Tensor, which: np.ndarray) -> torch.Tensor:
    if len(which) == len(logits):
        return logits
    (index,) = upload([which], torch.int64, logits.device)
    return logits.index_select(0, index)


def _ids(seq_ids: tuple[int, ...], which: np.ndarray) -> tuple[int, ...]:
    return tuple(seq_ids[index] for index in which)


class PendingStep:
    """A step that was started; in `read` alone the host waits for the device.

    Args:
        step_id: Its number.
        seq_ids: Sequences that get a token.
        tokens: int64 [sequences], theirs.
        extras, prompt: What else is to be told.
    """

    def __init__(
        self,
        step_id: int,
        seq_ids: tuple[int, ...],
        tokens: torch.Tensor,
        extras: Extras = NOTHING,
        prompt: tuple[PromptRows, ...] = (),
    ) -> None:
        self._step_id = step_id
        self._seq_ids = seq_ids
        self._extras = extras
        self._prompt = prompt
        self._tokens = tokens
        self._copied: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepOutput:
        """The step's tokens, and what else was asked for."""
        if self._copied is not None:
            self._copied.synchronize()
        output = StepOutput(self._step_id, self._seq_ids, self._tokens.tolist())
        if self._extras is not NOTHING:
            self._read_extras(output)
        for seq_id, start, best, logits in self._prompt:
            if best is not None:
                output.prompt_logprobs[seq_id] = (start + 1, _lines(best))
            if logits is not None:
                output.context_logits[seq_id] = (start, logits.cpu().numpy())
        return output

    def _read_extras(self, output: StepOutput) -> None:
        best, candidates = self._extras.logprobs, self._extras.candidates
        if best is not None:
            lines = _lines(best)
            for seq_id, count, line in zip(self._seq_ids, self._extras.counts, lines, strict=True):
                if count is not None:
                    output.logprobs[seq_id] = _narrow(line, count)
        if candidates is not None:
            ids, values = candidates.ids.cpu().numpy(), candidates.logprobs.cpu().numpy()
            for row, seq_id in enumerate(candidates.seq_ids):
                count = candidates.counts[row]
                output.candidates[seq_id] = Candidates(ids[row, :count], values[row, :count])
        if self._extras.logits is not None:
            seq_ids, rows = self._extras.logits
            output.logits.update(zip(seq_ids, rows.cpu().numpy(), strict=True))


def _lines(best: LogprobTensors) -> list[TokenLogprobs]:
    columns = (
        best.chosen.tolist(),
        best.ranks.tolist(),
        best.top_ids.tolist(),
        best.top_values.tolist(),
    )
    return [TokenLogprobs(*line) for line in zip(*columns, strict=True)]


def _narrow(line: TokenLogprobs, count: int) -> TokenLogprobs:
    if count < 0:
        return line
    return line._replace(top_ids=line.top_ids[:count], top_logprobs=line.top_logprobs[:count])
