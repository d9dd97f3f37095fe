"""What is measured: prompts of random tokens, the same for every engine and every run."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmfw_cli.bench.lengths import Lengths

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
    new_tokens: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def total_new_tokens(self) -> int:
        """Tokens to make in all."""
        return sum(self.new_tokens)

    def first(self, count: int) -> Workload:
        """The first `count` prompts of it."""
        return Workload(self.name, self.prompts[:count], self.new_tokens[:count])


def draw_workload(
    count: int, prompt: Lengths, new: Lengths, vocab_size: int, seed: int
) -> Workload:
    """Prompts of drawn lengths and tokens, then all output lengths; equal seeds, equal workloads.

    Args:
        count: Prompts.
        prompt: Their lengths.
        new: Tokens to make for each.
        vocab_size: Token ids are below it, and at most `HIGHEST_TOKEN`.
        seed: Of everything that is drawn.
    """
    rng = random.Random(seed)
    top = min(vocab_size - 1, HIGHEST_TOKEN)
    prompts = tuple(
        tuple(rng.randint(0, top) for _ in range(prompt.draw(rng))) for _ in range(count)
    )
    news = tuple(new.draw(rng) for _ in range(count))
    return Workload(f"{count} x {prompt} + {new}", prompts, news)


def fixed(count: int, prompt: int, new: int, vocab_size: int, seed: int) -> Workload:
    """Prompts of one length, each continued by the same number of tokens."""
    lengths = Lengths(str(prompt), prompt, prompt), Lengths(str(new), new, new)
    return draw_workload(count, *lengths, vocab_size, seed)
