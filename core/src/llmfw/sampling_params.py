"""How the tokens of a request are chosen and when they end, validated where it is made."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmfw.errors import UsageError

#: Fields that a checkpoint's generation_config may fill, and the value when nobody says anything.
NEUTRAL: Mapping[str, float | int] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_SEED_LIMIT = 1 << 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled; names and ranges follow vLLM's and TensorRT-LLM's.

    The five fields that default to None take the checkpoint's generation_config value, else the
    neutral one (`resolved` does it). Order: logit_bias, bad_words and min_tokens, penalties,
    temperature, top_k, top_p, min_p.

    With num_beams > 1 nothing is drawn: a beam search looks for the most probable completions, and
    the n best of its beams come out. It is transformers' search, with the same names, scores and
    order; logit_bias, bad_words, min_tokens and penalties change the log probabilities it adds up.
    Its blocks of the cache are taken when it starts, so it is never preempted; what it finds is
    told at its end.

    Args:
        n: Completions for the prompt, which they share; each has its own random numbers. With
            num_beams, how many of the beams come out (transformers' num_return_sequences); fewer
            when not so many can be found.
        num_beams: Beams of the search; 1 does not search. TensorRT-LLM's `use_beam_search` with
            `best_of` is the same.
        length_penalty: A finished beam's score is its log probability divided by its length to
            this power: above 0 favours long completions, below 0 short ones.
        early_stopping: When the search ends. True: once num_beams are finished. False: also once
            the best running beam cannot score better at its present length. "never": only once it
            cannot at any length.
        temperature: Logits are divided by it; 0 takes the most probable token. Where neither the
            request nor the checkpoint says anything of sampling the default is 0, as in
            TensorRT-LLM and transformers; once top_k, top_p, min_p, seed or n ask for it, 1.
        top_k: Only the k most probable tokens are kept; 0 or -1 keeps all. Default 0.
        top_p: Only the most probable tokens whose probabilities reach top_p are kept, in (0, 1].
            Default 1.
        min_p: Tokens less probable than min_p times the most probable one are dropped, in [0, 1].
            Default 0.
        repetition_penalty: Logits of tokens seen in prompt or output are divided (positive) or
            multiplied (negative) by it, > 0 (arXiv:1909.05858). Default 1.
        presence_penalty: Subtracted once from the logit of each token in the output, in [-2, 2].
        frequency_penalty: Subtracted for each occurrence of a token in the output, in [-2, 2].
        seed: Makes the random numbers of the request the same in any batch; None draws one from the
            engine's seed.
        max_tokens: Most tokens to make; None goes on up to the model's maximum length.
        min_tokens: No end-of-sequence or stop token before so many tokens.
        stop: String or strings that end the text; they are not part of it.
        stop_token_ids: Tokens that end it, beside the checkpoint's end-of-sequence tokens.
        ignore_eos: The checkpoint's end-of-sequence tokens end nothing.
        detokenize: False leaves `text` empty (stop strings then cannot be used).
        logprobs: For each token its log probability (of the model's own logits) and those of so
            many best; -1: all.
        prompt_logprobs: The same for the prompt's tokens, all of which are computed then: nothing
            comes from the prefix cache.
        prompt_logprobs_start: The first of the prompt's tokens that `prompt_logprobs` tells of; for
            those before it there is None, and the prefix cache may spare them.
        return_context_logits: Give the logits of the prompt's tokens, as `prompt_logprobs`
            without prefix cache hits.
        return_generation_logits: Give the logits that each token was chosen from, before any of
            the changes above. Not with num_beams.
        logit_bias: Added to the logits of these token ids.
        bad_words: Words that never come out, as they are and after a space. Each stands for the
            tokens that the tokenizer makes of it, or is a list of token ids itself; the last token
            of a word is impossible where those before it have just come, in prompt or output.
        include_stop_str_in_output: Keep the stop string (or stop token's text) at the end of the
            text.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        UsageError: For an unknown name (with the nearest one) or a value out of range.
    """

    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 32
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logit_bias: Mapping[int, float] | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    bad_words: Sequence[str | Sequence[int]] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            object.__setattr__(self, name, rule(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})",
                hint="raise max_tokens or lower min_tokens",
            )
        if self.stop and not self.detokenize:
            raise UsageError(
                "stop strings need the text, but detokenize is False",
                hint="use stop_token_ids, or leave detokenize on",
            )
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise UsageError(
                f"prompt_logprobs_start is {self.prompt_logprobs_start}, but prompt_logprobs is "
                "not set",
                hint="set prompt_logprobs=0 for the prompt's tokens alone",
            )
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise UsageError(
                f"n ({self.n}) is greater than num_beams ({self.num_beams})",
                hint="raise num_beams or lower n",
            )
        drawing = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for name, neutral in drawing.items():
            value = getattr(self, name)
            if value not in (None, neutral) and not (name == "top_k" and value < 0):
                raise UsageError(
                    f"{name}={value!r} draws, num_beams={self.num_beams} searches",
                    hint=f"leave {name} or num_beams out",
                    name=name,
                )
        if self.return_generation_logits:
            raise UsageError(
                "return_generation_logits does not go with num_beams",
                hint="leave one of them out; logprobs are given with beams, too",
            )

    @property
    def first_prompt_row(self) -> int:
        """The first of the prompt's tokens whose logits are wanted, where any are."""
        return 0 if self.return_context_logits else max(self.prompt_logprobs_start - 1, 0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def _asks_for_sampling(self) -> bool:
        """Whether a field is set that has a meaning only with random draws."""
        if self.num_beams > 1:
            return False
        drawn = (self.top_k, self.top_p, self.min_p, self.seed)
        return self.n > 1 or any(value is not None for value in drawn)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop or ())

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated like a new one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return SamplingParams(**{**fields, **changes})

    def resolved(self, generation_config: Mapping[str, Any] | None = None) -> SamplingParams:
        """A copy with unset fields filled from a generation_config, else neutral."""
        temperature = 1.0 if self._asks_for_sampling else 0.0
        told = _from_generation_config(generation_config or {}, searches=self.num_beams > 1)
        defaults = {**NEUTRAL, "temperature": temperature, **told}
        unset = {name: defaults[name] for name in NEUTRAL if getattr(self, name) is None}
        if not unset:
            return self
        made = copy.copy(self)  # every request comes here: only what is new is validated
        for name, value in unset.items():
            object.__setattr__(made, name, _RULES[name](name, value))
        return made

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any], **given: Any) -> SamplingParams:
        """The sampling that a checkpoint's generation_config.json asks for; `given` fields win.

        `do_sample: false` means temperature 0, `max_new_tokens` becomes max_tokens; null values say
        nothing.
        """
        searches = given.get("num_beams", 1) > 1
        fields: dict[str, Any] = _from_generation_config(raw, searches=searches)
        if raw.get("max_new_tokens") is not None:
            fields["max_tokens"] = raw["max_new_tokens"]
        return cls(**{**fields, **given}).resolved()


def _from_generation_config(raw: Mapping[str, Any], *, searches: bool = False) -> dict[str, Any]:
    """What a generation_config says; a beam search takes nothing of it that is about draws."""
    fields = {name: raw[name] for name in NEUTRAL if raw.get(name) is not None}
    if searches:
        return {name: fields[name] for name in fields if name == "repetition_penalty"}
    if raw.get("do_sample") is False:
        fields["temperature"] = 0.0
    elif raw.get("do_sample"):
        fields.setdefault("temperature", 1.0)
    return fields


def unknown_name(name: str, known: Iterable[str], what: str) -> UsageError:
    """The error for an unknown name, with the nearest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
    return UsageError(f"{what} has no {name!r}", hint=hint, name=name)


def _reject_unknown_names(cls: type[SamplingParams]) -> None:
    generated = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(generated)
    def checked(self: SamplingParams, *args: Any, **given: Any) -> None:
        if args:
            raise UsageError(
                "SamplingParams takes keyword arguments only",
                hint="SamplingParams(temperature=0.7, ...)",
            )
        for name in given:
            if name not in known:
                raise unknown_name(name, known, "SamplingParams")
        generated(self, **given)

    cls.__init__ = checked  # type: ignore[method-assign]


def _refuse(name: str, value: object, expected: str) -> UsageError:
    return UsageError(
        f"{name}={value!r} is out of range", hint=f"{name} must be {expected}", name=name
    )


_Rule = Callable[[str, Any], Any]


def _number(
    expected: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    optional: bool = False,
) -> _Rule:
    def rule(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        try:
            number = float(value) if not isinstance(value, (bool, str, bytes)) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        inside = low < number <= high if open_low else low <= number <= high
        if not inside or math.isinf(number):  # NaN is inside nothing
            raise _refuse(name, value, expected)
        return number

    return rule


def _integer(expected: str, low: int, high: int | None = None, *, optional: bool = False) -> _Rule:
    def rule(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise _refuse(name, value, expected)
        number = int(value)
        if number < low or (high is not None and number > high):
            raise _refuse(name, value, expected)
        return number

    return rule


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(
        isinstance(s, str) and s for s in items
    ):
        raise _refuse(name, value, "a string or a list of strings, none empty")
    return tuple(items)


def _early_stopping(name: str, value: Any) -> bool | str:
    if isinstance(value, bool) or value == "never":
        return value  # type: ignore[no-any-return]
    raise _refuse(name, value, 'True, False or "never"')


_TOKEN_ID = _integer("a token id", 0)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _refuse(name, value, "a list of token ids")
    return tuple(_TOKEN_ID(name, item) for item in value)


def _words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    expected = "strings or lists of token ids, none empty"
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise _refuse(name, value, expected)
    words: list[str | tuple[int, ...]] = []
    for item in items:
        word = item if isinstance(item, str) or item is None else _token_ids(name, item)
        if not word:
            raise _refuse(name, value, expected)
        words.append(word)
    return tuple(words)


def _bias(name: str, value: Any) -> dict[int, float] | None:
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "a mapping from token id to a finite number")
    finite = _number("a finite number for each token id", -math.inf)
    return {_TOKEN_ID(name, token): finite(name, bias) for token, bias in value.items()}


_RULES: Mapping[str, _Rule] = {
    "n": _integer("a whole number >= 1", 1),
    "num_beams": _integer("a whole number >= 1", 1),
    "length_penalty": _number("a finite number", -math.inf),
    "early_stopping": _early_stopping,
    "temperature": _number("a finite number >= 0 (0 is greedy)", 0.0, optional=True),
    "top_k": _integer("a whole number >= 1, or 0 or -1 for all tokens", -1, optional=True),
    "top_p": _number("in (0, 1]", 0.0, 1.0, open_low=True, optional=True),
    "min_p": _number("in [0, 1]", 0.0, 1.0, optional=True),
    "repetition_penalty": _number("a finite number > 0", 0.0, open_low=True, optional=True),
    "presence_penalty": _number("in [-2, 2]", -2.0, 2.0),
    "frequency_penalty": _number("in [-2, 2]", -2.0, 2.0),
    "seed": _integer(
        "a whole number of at most 64 bits", -(1 << 63), _SEED_LIMIT - 1, optional=True
    ),
    "max_tokens": _integer("a whole number >= 1, or None for no limit", 1, optional=True),
    "min_tokens": _integer("a whole number >= 0", 0),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "detokenize": _flag,
    "logprobs": _integer("a whole number >= 0, or -1 for the whole vocabulary", -1, optional=True),
    "prompt_logprobs": _integer(
        "a whole number >= 0, or -1 for the whole vocabulary", -1, optional=True
    ),
    "prompt_logprobs_start": _integer("a whole number >= 0", 0),
    "logit_bias": _bias,
    "return_context_logits": _flag,
    "return_generation_logits": _flag,
    "bad_words": _words,
    "include_stop_str_in_output": _flag,
    "skip_special_tokens": _flag,
}

_reject_unknown_names(SamplingParams)
