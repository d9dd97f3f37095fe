"""What `llmfw verify` found: a stage a line, and the first module that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmfw.testing.divergence import Divergence


@dataclass(frozen=True)
class Stage:
    """One comparison.

    Args:
        name: What was compared.
        outcome: "passed", "failed" or "skipped".
        detail: What was found, in a line.
        worst, allowed: The largest difference and what may be; None where there is no number.
    """

    name: str
    outcome: str
    detail: str = ""
    worst: float | None = None
    allowed: float | None = None


@dataclass
class VerifyReport:
    """All stages of one verification.

    Args:
        facts: What was verified: model, plugin, reference, dtype, device.
        stages: In the order in which they ran.
        divergence: The first module whose activations differ, once a stage has failed.
    """

    facts: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    divergence: Divergence | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no stage failed."""
        return all(stage.outcome != "failed" for stage in self.stages)

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Stage, outcome, largest difference, what is allowed, and detail, as text."""
        for stage in self.stages:
            worst = "" if stage.worst is None else f"{stage.worst:.1e}"
            allowed = "" if stage.allowed is None else f"{stage.allowed:.1e}"
            yield stage.name, stage.outcome, worst, allowed, stage.detail

    def divergence_lines(self) -> Iterator[tuple[str, str]]:
        """The first diverging module as names and values; nothing where all agree."""
        found = self.divergence
        if found is None:
            return
        yield "first diverging module", found.module
        yield "where", found.where
        yield "reference's module", found.pair.theirs
        yield "layer", "outside of the layers" if found.layer is None else str(found.layer)
        yield "expected", f"{list(found.expected)} at token {found.token}"
        yield "got", str(list(found.got))
        for number, line in enumerate(found.explain().splitlines()):
            yield "look at" if number == 0 else "", line

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            **self.facts,
            "passed": self.passed,
            "stages": [vars(stage) for stage in self.stages],
            "divergence": self.divergence.as_dict() if self.divergence else None,
            "seconds": round(self.seconds, 3),
        }
