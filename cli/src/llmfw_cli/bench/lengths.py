"""Lengths of prompts and outputs: fixed, uniform over a range, or normal; drawn with a seed."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from llmfw.errors import UsageError

HELP = "a number, A..B (uniform) or normal(MEAN,STD)"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NORMAL = re.compile(r"normal\((\d+(?:\.\d+)?),\s*(\d+(?:\.\d+)?)\)")


@dataclass(frozen=True)
class Lengths:
    """How long prompts or outputs are.

    Args:
        text: As it was written.
        low, high: Bounds of a uniform length; equal for a fixed one.
        mean, std: Of a normal one, whose draws are rounded and at least 1.
    """

    text: str
    low: int = 1
    high: int = 1
    mean: float | None = None
    std: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether every draw is the same."""
        return self.mean is None and self.low == self.high

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.mean is not None:
            return max(1, round(rng.gauss(self.mean, self.std)))
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return self.text


def parse_lengths(text: str) -> Lengths:
    """What `HELP` says.

    Raises:
        UsageError: If it is none of that, or a length below 1.
    """
    if text.isdecimal() and int(text) > 0:
        return Lengths(text, int(text), int(text))
    if (found := _RANGE.fullmatch(text)) and 0 < int(found[1]) <= int(found[2]):
        return Lengths(text, int(found[1]), int(found[2]))
    if (found := _NORMAL.fullmatch(text)) and float(found[1]) >= 1:
        return Lengths(text, mean=float(found[1]), std=float(found[2]))
    raise UsageError(f"{text!r} is no length", hint=f"give {HELP}; all at least 1")


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    """A comma list of whole numbers above 0.

    Raises:
        UsageError: If it is none.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise UsageError(f"{what} {text!r} is no list of numbers", hint="e.g. 1,8,64") from exc
    if min(numbers) < 1:
        raise UsageError(f"{what} {text!r} has a number below 1", hint="e.g. 1,8,64")
    return numbers
