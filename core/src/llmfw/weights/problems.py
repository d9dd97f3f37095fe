"""What does not fit between a checkpoint and a model, gathered and told in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmfw.errors import WeightError

_KINDS = ("missing", "surplus", "shape", "dtype", "duplicate", "parallel")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Problem:
    """One thing that does not fit.

    Args:
        kind: "missing", "surplus", "shape", "dtype", "duplicate" or "parallel".
        name: The tensor or parameter.
        detail: What is wrong with it.
    """

    kind: str
    name: str
    detail: str


def weight_error(problems: Iterable[Problem], checkpoint: str, hint: str) -> WeightError:
    """The one error that lists all problems, ordered by kind and then as they were found."""
    ordered = sorted(problems, key=lambda problem: _KINDS.index(problem.kind))
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    lines = [f"  {problem.kind:<9}  {problem.name}: {problem.detail}" for problem in ordered]
    message = "\n".join([f"{count} between the model and {checkpoint}:", *lines])
    return WeightError(message, hint=hint, problems=tuple(ordered))


class Nearest:
    """Finds the names most like a given one; those with the same numbers come first."""

    def __init__(self, names: Sequence[str]) -> None:
        self._by_numbers: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            self._by_numbers.setdefault(_numbers(name), []).append(name)
        self._all = list(names)

    def to(self, name: str) -> str:
        """ " (nearest: a, b)" for the two best, or "" when nothing is like it."""
        same = self._by_numbers.get(_numbers(name), [])[:200]
        found = difflib.get_close_matches(name, same, n=2)
        if not found and len(self._all) <= 200:
            found = difflib.get_close_matches(name, self._all, n=2)
        return f" (nearest: {', '.join(found)})" if found else ""


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(_NUMBER.findall(name))
