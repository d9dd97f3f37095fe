"""One completion under way: its tokens, text and log probabilities, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmfw.engine.detokenizer import Decoder, Detokenizer
from llmfw.engine.step import TokenLogprobs
from llmfw.request import CompletionOutput, FinishReason, Logprob, Request


@dataclass(frozen=True, slots=True)
class EndRules:
    """When a completion ends, beside stop strings.

    eos_ids: end-of-sequence tokens that count (none with ignore_eos). stop_ids: the request's own.
    max_new_tokens: tokens after which its length ends it.
    """

    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    min_tokens: int
    max_new_tokens: int

    def may_stop(self, count: int) -> bool:
        """Whether the `count`-th token may stop it."""
        return count >= self.min_tokens

    def stops(self, token: int, count: int) -> bool:
        """Whether `token`, the `count`-th, is one that stops it."""
        return self.may_stop(count) and (token in self.eos_ids or token in self.stop_ids)


class Completion:
    """What the engine knows of one sequence beside its computation.

    Args:
        request: The request it belongs to.
        index: Which of the request's n completions it is.
        rules: When it ends.
        decoder: The tokenizer, or None to leave the text empty.
    """

    def __init__(
        self, request: Request, index: int, rules: EndRules, decoder: Decoder | None
    ) -> None:
        sampling = request.sampling
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self.cumulative_logprob = None if sampling.logprobs is None else 0.0
        self.logits: list[np.ndarray] | None = None
        if sampling.return_generation_logits:
            self.logits = []
        self._decoder = decoder
        self._rules = rules
        self._ends = rules.eos_ids | rules.stop_ids
        self._include_stop = sampling.include_stop_str_in_output
        self._shown_chars = 0
        self._shown_tokens = 0
        self._text = detokenizer_for(request, decoder)

    def push(
        self,
        token: int,
        logprobs: TokenLogprobs | None = None,
        logits: np.ndarray | None = None,
    ) -> None:
        """Add a token and see whether it ends the completion."""
        self.token_ids.append(token)
        if logits is not None and self.logits is not None:
            self.logits.append(logits)
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.append(logprob_entry(token, logprobs, self._decode_one))
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprobs.logprob
        rules = self._rules
        count = len(self.token_ids)
        ends = token in self._ends and count >= rules.min_tokens
        if self._text is not None and (not ends or self._include_stop):
            stop = self._text.push(token, search=rules.may_stop(count))
            if stop is not None and not ends:
                self.finish_reason, self.stop_reason = FinishReason.STOP, stop
                return
        if ends:
            self.stop_reason = token if token in rules.stop_ids else None
            self.finish(FinishReason.STOP)
        elif count >= rules.max_new_tokens:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason) -> None:
        """End it for a reason other than a stop string, and let out text that was held back."""
        self.finish_reason = reason
        if self._text is not None and reason is not FinishReason.ERROR:  # it may be the tokenizer's
            stop = self._text.finish()
            if stop is not None and reason is FinishReason.LENGTH:
                self.finish_reason, self.stop_reason = FinishReason.STOP, stop

    def output(self, *, advance: bool = False) -> CompletionOutput:
        """The completion so far; with `advance` the next one's diffs start where this ends."""
        text = "" if self._text is None else self._text.text
        if self.finish_reason is None and self._text is not None:
            text = text[: self._text.visible]
        tokens = list(self.token_ids)
        made = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            text_diff=text[self._shown_chars :],
            token_ids_diff=tokens[self._shown_tokens :],
            generation_logits=np.stack(self.logits) if self.logits else None,
        )
        if advance:
            self._shown_chars = max(self._shown_chars, len(text))
            self._shown_tokens = len(tokens)
        return made

    def _decode_one(self, token: int) -> str | None:
        return decode_one(self._decoder, token)


def detokenizer_for(request: Request, decoder: Decoder | None) -> Detokenizer | None:
    """What makes a completion's text, or None where none is wanted."""
    sampling = request.sampling
    if decoder is None or not sampling.detokenize:
        return None
    return Detokenizer(
        decoder,
        request.prompt_token_ids,
        stops=sampling.stop_strings,
        include_stop=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
    )


def decode_one(decoder: Decoder | None, token: int) -> str | None:
    """The text of one token alone, special ones included."""
    return None if decoder is None else decoder.decode([token], skip_special_tokens=False)


def logprob_entry(
    token: int, logprobs: TokenLogprobs, decode: Callable[[int], str | None]
) -> dict[int, Logprob]:
    """Log probabilities by token: the best ones, and the chosen one wherever it stands."""
    entry = {token: Logprob(logprobs.logprob, logprobs.rank, decode(token))}
    pairs = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    for rank, (other, value) in enumerate(pairs, start=1):
        if other != token:
            entry[other] = Logprob(value, rank, decode(other))
    return entry
