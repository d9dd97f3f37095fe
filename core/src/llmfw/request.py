"""What goes into the engine and what comes out of it: plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from llmfw.errors import LlmfwError
from llmfw.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np


class FinishReason(StrEnum):
    """Why a completion ended; members are plain strings."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's maximum length
    ABORT = "abort"  # the caller asked
    ERROR = "error"  # see RequestOutput.error


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed, ready for the engine.

    Args:
        request_id: Unique while the request lives.
        prompt_token_ids: The prompt, at least one token.
        sampling: Parameters with every field set (`SamplingParams.resolved`).
        prompt: Its text, if it came as text.
        arrival: `time.perf_counter()` when it came.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    prompt: str | None = None
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log probability, its rank (1 is the most probable) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class Timings:
    """Moments of a request, in seconds of `time.perf_counter()`; None: it has not happened.

    first_step, last_step: the engine's steps, counted from its start, that gave the first token and
    the last; one that is aborted or fails has no last.
    """

    arrival: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    first_step: int | None = None
    last_step: int | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def total(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt, so far or whole.

    token_ids hold the token that ended it; text does not, unless the parameters ask for it.
    generation_logits: float32 [tokens, vocab], where asked for.
    `text_diff` and `token_ids_diff` are what came since the output before this one of the same
    stream (all of it, if not streamed).
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string; None for end of sequence
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)
    generation_logits: np.ndarray | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions.

    prompt_logprobs: one entry a prompt token; the first is None, for nothing comes before it, and
        so are those before `prompt_logprobs_start`.
    context_logits: float32 [prompt tokens, vocab], where asked for.
    num_cached_tokens: prompt tokens whose state came from the prefix cache.
    error: why the request failed; its completions then have finish_reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    error: LlmfwError | None = None
    context_logits: np.ndarray | None = None

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.outputs[0].text
