"""From a request to what the engine's thread works with: checked, with its sequences and ends."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmfw.engine.beam_search import BeamSearch, num_candidates
from llmfw.engine.completion import Completion, EndRules, detokenizer_for
from llmfw.engine.detokenizer import Decoder
from llmfw.engine.generation import Generation
from llmfw.engine.scheduler import Scheduler
from llmfw.engine.sequence import Sequence
from llmfw.engine.step import NewRequest
from llmfw.errors import RequestError
from llmfw.request import Request
from llmfw.sampling_params import SamplingParams

logger = logging.getLogger("llmfw.engine")

_EVERY = 1 << 62  # candidates: the whole vocabulary


class TextCodec(Decoder, Protocol):
    """What the engine needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is ready for the engine's thread.

    sequences: one a completion, or the beams of the search.
    """

    generation: Generation
    sequences: list[Sequence]
    search: BeamSearch | None = None


class Intake:
    """Checks requests and gives them their sequences; any thread may ask.

    Args:
        scheduler: Whose limits hold.
        seed: Where requests without a seed get theirs from.
        tokenizer: For text and stop strings, or None.
        eos_ids: The checkpoint's end-of-sequence tokens.
        vocab_size: Token ids are below it; None: not checked.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        seed: int,
        *,
        tokenizer: TextCodec | None = None,
        eos_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
    ) -> None:
        self.eos_ids = _within(eos_ids, vocab_size)
        self._scheduler = scheduler
        self._seed = seed
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._seq_numbers = itertools.count(1)  # `next` of these is safe in any thread
        self._draw_numbers = itertools.count(1)

    def take(self, request: Request, abort: Callable[[str], None], *, streaming: bool) -> Arrival:
        """Check a request and make its parts; `abort` is what its handle calls.

        Raises:
            RequestError: If it cannot be served.
        """
        sampling = request.sampling.resolved()
        self._check(request, sampling)
        rules = self._rules(request, sampling)
        numbers = [next(self._seq_numbers) for _ in range(max(sampling.n, sampling.num_beams))]
        try:
            bad_words = self._bad_word_ids(sampling)
            completions = [
                Completion(request, index, rules, self._tokenizer) for index in range(sampling.n)
            ]
            search = self._search(request, sampling, numbers, rules)
        except Exception as exc:
            raise RequestError(f"the tokenizer failed: {exc!r}") from exc
        seed = sampling.seed
        if seed is None:
            seed = _mix_seed(self._seed, next(self._draw_numbers))
        sequences = [
            _sequence(request, sampling, index, seq_id, rules, seed, bad_words)
            for index, seq_id in enumerate(numbers)
        ]
        generation = Generation(request, completions, tuple(numbers), abort, streamed=streaming)
        return Arrival(generation, sequences, search)

    def _rules(self, request: Request, sampling: SamplingParams) -> EndRules:
        longest, prompt_len = self._scheduler.longest, len(request.prompt_token_ids)
        if sampling.num_beams > 1:
            longest = self._scheduler.longest_beams(sampling.num_beams, prompt_len)
        room = longest - prompt_len
        return EndRules(
            frozenset() if sampling.ignore_eos else self.eos_ids,
            frozenset(sampling.stop_token_ids or ()),
            sampling.min_tokens,
            room if sampling.max_tokens is None else min(room, sampling.max_tokens),
        )

    def _search(
        self, request: Request, sampling: SamplingParams, seq_ids: list[int], rules: EndRules
    ) -> BeamSearch | None:
        if sampling.num_beams == 1:
            return None
        decoder = self._tokenizer if sampling.stop_strings else None
        return BeamSearch(seq_ids, sampling, rules, detokenizer_for(request, decoder))

    def _check(self, request: Request, sampling: SamplingParams) -> None:
        self._scheduler.check_length(len(request.prompt_token_ids))
        bad_words = sampling.bad_words or ()
        spelled = any(isinstance(word, str) for word in bad_words)
        if self._tokenizer is None and (sampling.stop_strings or spelled):
            raise RequestError(
                "stop strings and bad words need a tokenizer",
                hint="use stop_token_ids and logit_bias, or leave skip_tokenizer_init off",
            )
        vocab = self._vocab_size
        if vocab is None:
            return
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("stop_token_ids", sampling.stop_token_ids or ()),
            ("logit_bias", tuple(sampling.logit_bias or ())),
            *(("bad_words", word) for word in bad_words if not isinstance(word, str)),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                wrong = next(token for token in ids if not 0 <= token < vocab)
                raise RequestError(
                    f"token id {wrong} in {name} is out of range",
                    hint=f"the model's ids are 0 to {vocab - 1}",
                )

    def _bad_word_ids(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each bad word, at the start of a text and after a space.

        A sequence with a token of the tokenizer that the model lacks cannot come out.
        """
        found: set[tuple[int, ...]] = set()
        for word in sampling.bad_words or ():
            if not isinstance(word, str):
                found.add(tuple(word))
                continue
            assert self._tokenizer is not None
            for text in (word, " " + word.lstrip()):
                found.add(tuple(self._tokenizer.encode(text, add_special_tokens=False)))
        vocab = self._vocab_size
        return tuple(sorted(ids for ids in found if ids and (vocab is None or max(ids) < vocab)))


def _within(eos_ids: frozenset[int], vocab_size: int | None) -> frozenset[int]:
    """Those that the model has; a configuration may say -1 for none, or name one by mistake."""
    known = frozenset(
        token for token in eos_ids if token >= 0 and (vocab_size is None or token < vocab_size)
    )
    beyond = ", ".join(str(token) for token in sorted(eos_ids - known) if token >= 0)
    if beyond:
        logger.warning("the model has no token %s, which is to end its sequences", beyond)
    return known


def _sequence(
    request: Request,
    sampling: SamplingParams,
    index: int,
    seq_id: int,
    rules: EndRules,
    base_seed: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> Sequence:
    """One of the request's sequences; the first has its seed and tells of the prompt."""
    tells = sampling.prompt_logprobs is not None or sampling.return_context_logits
    if index and tells:
        sampling = sampling.replace(
            prompt_logprobs=None, prompt_logprobs_start=0, return_context_logits=False
        )
    new = NewRequest(
        seq_id,
        request.prompt_token_ids,
        sampling,
        seed=_mix_seed(base_seed, index),
        stop_ids=tuple(rules.eos_ids | rules.stop_ids),
        bad_words=bad_words,
        num_candidates=_num_candidates(sampling, rules),
    )
    limit = len(request.prompt_token_ids) + rules.max_new_tokens
    return Sequence(new, limit, most_cached=sampling.first_prompt_row if tells else None)


def _num_candidates(sampling: SamplingParams, rules: EndRules) -> int:
    """How many candidates a beam's step tells of; 0 for a sequence that is no beam."""
    if sampling.num_beams == 1:
        return 0
    if sampling.logprobs == -1:
        return _EVERY
    return max(num_candidates(sampling.num_beams, rules), sampling.logprobs or 0)


def _mix_seed(seed: int, index: int) -> int:
    """64 bits that differ for every index, the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little"
    )
