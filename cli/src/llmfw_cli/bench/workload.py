"""What is measured: prompts of random tokens, the same for every engine and every run."""

from __future__ import annotations

import random
from dataclasses import dataclass

HIGHEST_TOKEN = 10_000


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each is to be continued by.

    Args:
        name: What reports call it.
        prompts: Token ids of each prompt.
        new_tokens: Tokens to make for each prompt, no fewer and no more.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def total_new_tokens(self) -> int:
        """Tokens to make in all."""
        return self.new_tokens * len(self.prompts)


def random_prompts(
    count: int, shortest: int, longest: int, vocab_size: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Prompts of uniformly drawn lengths and tokens; equal seeds give equal prompts."""
    draw = random.Random(seed)
    top = min(vocab_size, HIGHEST_TOKEN) - 1
    return tuple(
        tuple(draw.randint(0, top) for _ in range(draw.randint(shortest, longest)))
        for _ in range(count)
    )


def one_prompt(length: int, new_tokens: int, vocab_size: int, seed: int) -> Workload:
    """One prompt of an exact length."""
    prompts = random_prompts(1, length, length, vocab_size, seed)
    return Workload(f"1 x {length} + {new_tokens}", prompts, new_tokens)


def many_prompts(
    count: int, shortest: int, longest: int, new_tokens: int, vocab_size: int, seed: int
) -> Workload:
    """Several prompts at once."""
    prompts = random_prompts(count, shortest, longest, vocab_size, seed)
    return Workload(f"{count} x {shortest}..{longest} + {new_tokens}", prompts, new_tokens)
