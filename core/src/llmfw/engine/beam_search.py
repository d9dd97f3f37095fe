"""Beam search over one request: which continuations live on, which are finished, when it ends.

The arithmetic and the order are those of transformers' `GenerationMixin._beam_search`, float32
scores included, so that both find the same sequences: of the best continuations over all beams,
those that end are kept aside with a score normalised by their length, the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfw.engine.beam_group import Move
from llmfw.engine.completion import Completion, EndRules
from llmfw.engine.detokenizer import Detokenizer
from llmfw.engine.step import Candidates, TokenLogprobs
from llmfw.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Beam:
    """A beam that goes on, or a finished one.

    score: the sum of its log probabilities, float32.
    normalised: of a finished one, score / length ** length_penalty, float32.
    text: its detokenizer, where stop strings have to be found.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    score: np.float32
    text: Detokenizer | None = None
    normalised: np.float32 | None = None


def _rank(beam: Beam) -> float:
    assert beam.normalised is not None
    return -float(beam.normalised)


def num_candidates(num_beams: int, rules: EndRules) -> int:
    """How many continuations are looked at in a step: enough that num_beams of them do not end."""
    return max(2, 1 + len(rules.eos_ids | rules.stop_ids)) * num_beams


class BeamSearch:
    """The beams of one request.

    Args:
        seq_ids: A number for each beam in scheduler and worker; the first computes the prompt.
        sampling: num_beams, length_penalty, early_stopping, logprobs.
        rules: What ends a beam.
        text: A detokenizer without tokens, if there are stop strings.
    """

    def __init__(
        self,
        seq_ids: list[int],
        sampling: SamplingParams,
        rules: EndRules,
        text: Detokenizer | None = None,
    ) -> None:
        self.seq_ids = seq_ids
        self.finished: list[Beam] = []  # best first, at most num_beams
        self._sampling = sampling
        self._rules = rules
        self._running = [Beam(seq_ids[0], (), (), np.float32(0.0), text)]  # best first
        self._offers: dict[int, Candidates] = {}
        self._wanted = num_candidates(sampling.num_beams, rules)

    def offer(self, seq_id: int, candidates: Candidates) -> bool:
        """Take a beam's candidates for its next token; True when those of all beams are there."""
        self._offers[seq_id] = candidates
        return len(self._offers) == len(self._running)

    def advance(self) -> list[Move]:
        """Choose among all candidates: where each beam goes on from, or nothing at the end."""
        num_beams = self._sampling.num_beams
        running: list[Beam] = []
        ended: list[Beam] = []
        for rank, child in enumerate(self._best_children()):
            if self._ends(child):
                if rank < num_beams:
                    ended.append(self._normalised(child))
            elif len(running) < num_beams:
                running.append(child)
        ranked = sorted((*self.finished, *ended), key=_rank)
        self.finished = ranked[:num_beams]
        self._offers.clear()
        if not running or self._is_over(running[0]):
            return []
        self._running, moves = self._placed(running)
        return moves

    def fill(self, completions: list[Completion]) -> None:
        """Give the finished beams to completions, best first; too many of these are dropped."""
        del completions[len(self.finished) :]
        for completion, beam in zip(completions, self.finished, strict=False):
            for index, token in enumerate(beam.token_ids):
                completion.push(token, beam.logprobs[index] if beam.logprobs else None)
            completion.cumulative_logprob = float(beam.score)

    def _best_children(self) -> list[Beam]:
        """The best continuations of all beams, best first; they have their parents' seq_ids."""
        offers = [self._offers[beam.seq_id] for beam in self._running]
        scores = np.concatenate(
            [offer.logprobs + beam.score for beam, offer in zip(self._running, offers, strict=True)]
        )
        sizes = [len(offer.token_ids) for offer in offers]
        owner = np.repeat(np.arange(len(offers)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes])
        best = np.argsort(-scores, kind="stable")[: self._wanted]
        return [
            self._child(self._running[owner[i]], offers[owner[i]], int(place[i]), scores[i])
            for i in best
            if np.isfinite(scores[i])  # impossible tokens are no continuation
        ]

    def _child(self, parent: Beam, offer: Candidates, place: int, score: np.float32) -> Beam:
        logprobs = parent.logprobs
        count = self._sampling.logprobs
        if count is not None:
            width = len(offer.token_ids) if count < 0 else count
            entry = TokenLogprobs(
                float(offer.logprobs[place]),
                place + 1,
                offer.token_ids[:width].tolist(),
                offer.logprobs[:width].tolist(),
            )
            logprobs = (*logprobs, entry)
        tokens = (*parent.token_ids, int(offer.token_ids[place]))
        text = None if parent.text is None else parent.text.clone()
        return Beam(parent.seq_id, tokens, logprobs, score, text)

    def _ends(self, beam: Beam) -> bool:
        rules, token, count = self._rules, beam.token_ids[-1], len(beam.token_ids)
        if rules.stops(token, count) or count >= rules.max_new_tokens:
            return True
        return beam.text is not None and (
            beam.text.push(token, search=rules.may_stop(count)) is not None
        )

    def _normalised(self, beam: Beam) -> Beam:
        """The finished beam, without what only running ones need."""
        length = np.float32(len(beam.token_ids) ** self._sampling.length_penalty)
        return Beam(
            beam.seq_id,
            beam.token_ids,
            beam.logprobs,
            beam.score,
            normalised=np.float32(beam.score / length),
        )

    def _is_over(self, best: Beam) -> bool:
        """Whether enough are finished and, unless early_stopping, none can become better."""
        if len(self.finished) < self._sampling.num_beams:
            return False
        early, penalty = self._sampling.early_stopping, self._sampling.length_penalty
        if early is True:
            return True
        length = len(best.token_ids)
        if early == "never" and penalty > 0.0:
            length = self._rules.max_new_tokens
        hoped = np.float32(best.score / np.float32(length**penalty))
        return -float(hoped) >= _rank(self.finished[-1])

    def _placed(self, children: list[Beam]) -> tuple[list[Beam], list[Move]]:
        """Give each beam a sequence: its parent's to the best child, free ones to the others."""
        parents = {child.seq_id for child in children}
        free = [seq_id for seq_id in self.seq_ids if seq_id not in parents]
        taken: set[int] = set()
        placed: list[Beam] = []
        moves: list[Move] = []
        for child in children:
            parent = child.seq_id
            seq_id = free.pop() if parent in taken else parent
            taken.add(seq_id)
            placed.append(Beam(seq_id, child.token_ids, child.logprobs, child.score, child.text))
            moves.append(Move(seq_id, parent, child.token_ids[-1]))
        return placed, moves
