"""What travels between scheduler and worker each step: small picklable deltas, never tensors.

Arrays of logits, where a request asks for them, are numpy's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmfw.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """All that a worker has to know of a sequence, sent once, before its first chunk.

    Args:
        seq_id: The sequence's number; a request with n completions has n of them.
        prompt_token_ids: The prompt.
        sampling: Parameters with every field set.
        seed: 64 bits; with a position they give the random number of that position.
        stop_ids: Tokens that must not come before min_tokens.
        bad_words: Token sequences that must not come out.
        num_candidates: For a beam: how many of the best next tokens are told of; 0 for no beam.
    """

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_candidates: int = 0


class Fork(NamedTuple):
    """A beam goes on from a beam's tokens, its own or another's.

    All forks of a step happen at once, before its chunks.

    seq_id, parent: the sequence, and the one whose tokens and state it takes.
    position, token: what follows these tokens, and where.
    source, target: a block of the cache that is to be copied, and where to; equal for none.
    """

    seq_id: int
    parent: int
    position: int
    token: int
    source: int = 0
    target: int = 0


class Chunk(NamedTuple):
    """The part of a sequence that one step computes.

    start, num_tokens: positions start .. start + num_tokens - 1, tokens the worker knows.
    samples: whether a token is sampled after the last of them.
    blocks: blocks added to the sequence's table; with `restart` they replace it (first chunk, or
        after preemption).
    """

    seq_id: int
    start: int
    num_tokens: int
    samples: bool
    blocks: tuple[int, ...] = ()
    restart: bool = False


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step: `finished` sequences are forgotten, `new` ones made, then `chunks` computed.

    forks: of beams, before the chunks are computed.

    chunks: context chunks first, then the num_generations chunks of one token.
    """

    step_id: int
    chunks: tuple[Chunk, ...]
    num_generations: int
    new: tuple[NewRequest, ...] = ()
    finished: tuple[int, ...] = ()
    forks: tuple[Fork, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes in this step."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def grown(self) -> list[Chunk]:
        """The chunks that bring blocks."""
        return [chunk for chunk in self.chunks if chunk.blocks or chunk.restart]


class TokenLogprobs(NamedTuple):
    """A token's log probability and rank, and the most probable tokens with theirs, best first."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Candidates(NamedTuple):
    """The best next tokens of a beam: ids int64 [n], log probabilities float32 [n], best first."""

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The tokens of one step.

    seq_ids, token_ids: the sampled token of each chunk that samples, in the order of the chunks; a
        negative token means that the model's logits were not finite.
    logprobs: by sequence, where asked for.
    prompt_logprobs: by sequence, the position of the first prompt token told of, and one entry a
        token.
    candidates: by sequence, of beams.
    logits: by sequence, float32 [vocab], what the token was sampled from, where asked for.
    context_logits: by sequence, the position of the first prompt token told of, and float32
        [tokens, vocab].
    """

    step_id: int
    seq_ids: tuple[int, ...]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    logits: dict[int, np.ndarray] = field(default_factory=dict)
    context_logits: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
