"""How a check says what is wrong: module, tensor, expected, got, and where to look."""

from __future__ import annotations

from typing import Any


class CheckFailure(AssertionError):
    """A check found a difference.

    Args:
        problem: One sentence: what is wrong.
        module: Path of the module concerned, ours and the reference's where both are known.
        tensor: The parameter, tensor, logit or file concerned.
        expected: What should be there.
        got: What is there.
        look: Where to look, one place a line.
    """

    def __init__(
        self,
        problem: str,
        *,
        module: str | None = None,
        tensor: str | None = None,
        expected: object = None,
        got: object = None,
        look: str | None = None,
    ) -> None:
        self.problem = problem
        self.facts: dict[str, str] = {
            name: str(value)
            for name, value in (
                ("module", module),
                ("tensor", tensor),
                ("expected", expected),
                ("got", got),
                ("look at", look),
            )
            if value is not None
        }
        super().__init__(problem)

    def __str__(self) -> str:
        lines = [self.problem]
        for name, value in self.facts.items():
            first, *rest = value.splitlines() or [""]
            lines.append(f"  {name:<9} {first}")
            lines += [f"  {'':<9} {line}" for line in rest]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"problem": self.problem, **self.facts}


class CheckSkipped(Exception):
    """A check that does not apply, and why."""
