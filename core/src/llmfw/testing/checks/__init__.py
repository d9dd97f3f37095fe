"""The checks of the contract: plain functions of a `Subject` that raise `CheckFailure`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmfw.errors import LlmfwError, WeightError
from llmfw.testing.checks.config import config_round_trip
from llmfw.testing.checks.discovery import discovered_by_metadata, imports_without_torch
from llmfw.testing.checks.engine import (
    greedy_matches_reference,
    greedy_repeatable,
    no_hooks_while_decoding,
    preempted_undisturbed,
    prefix_cache_hit,
)
from llmfw.testing.checks.gpu import graphs_equal_eager, kernels_equal_references
from llmfw.testing.checks.logits import (
    chunked_prefill,
    matches_reference,
    ragged_batch,
    step_by_step,
)
from llmfw.testing.checks.packaging import wheel_builds_and_installs
from llmfw.testing.checks.weights import accounts_for_every_tensor, save_load_round_trip
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.subject import Subject

__all__ = [
    "CHECKS",
    "Check",
    "CheckFunction",
    "CheckResult",
    "run_checks",
    "discovered_by_metadata",
    "imports_without_torch",
    "config_round_trip",
    "accounts_for_every_tensor",
    "matches_reference",
    "step_by_step",
    "chunked_prefill",
    "ragged_batch",
    "greedy_matches_reference",
    "greedy_repeatable",
    "prefix_cache_hit",
    "preempted_undisturbed",
    "no_hooks_while_decoding",
    "save_load_round_trip",
    "wheel_builds_and_installs",
    "kernels_equal_references",
    "graphs_equal_eager",
]

CheckFunction = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One check of the contract.

    Args:
        run: The function; its name is the check's.
        slow: Takes more than a few seconds.
        gpu: Needs an NVIDIA GPU.
    """

    run: CheckFunction
    slow: bool = False
    gpu: bool = False

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.run.__name__

    @property
    def claim(self) -> str:
        """What holds when it passes, in one sentence."""
        return (self.run.__doc__ or "").strip().split("\n")[0]


CHECKS = (
    Check(discovered_by_metadata),
    Check(imports_without_torch),
    Check(config_round_trip),
    Check(accounts_for_every_tensor),
    Check(matches_reference),
    Check(step_by_step),
    Check(chunked_prefill),
    Check(ragged_batch),
    Check(greedy_matches_reference),
    Check(greedy_repeatable),
    Check(prefix_cache_hit),
    Check(preempted_undisturbed),
    Check(no_hooks_while_decoding),
    Check(save_load_round_trip),
    Check(wheel_builds_and_installs, slow=True),
    Check(kernels_equal_references, gpu=True),
    Check(graphs_equal_eager, gpu=True),
)
"""In the order in which a failure explains those after it."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found: "passed", "failed" or "skipped", and why."""

    name: str
    outcome: str
    detail: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "seconds": round(self.seconds, 3)}


def run_checks(subject: Subject, checks: Iterable[Check] = CHECKS) -> Iterator[CheckResult]:
    """Run checks one after the other.

    An error of loading fails the first check that meets it; the others that need the weights are
    then skipped.
    """
    misfit_in: str | None = None
    for check in checks:
        begin = time.perf_counter()
        try:
            check.run(subject)
            outcome, detail = "passed", ""
        except CheckSkipped as skipped:
            outcome, detail = "skipped", str(skipped)
        except (CheckFailure, LlmfwError) as failure:
            outcome, detail = "failed", str(failure)
            if isinstance(failure, WeightError) or isinstance(failure.__cause__, WeightError):
                if misfit_in is not None:
                    outcome, detail = "skipped", f"the weights do not fit (see {misfit_in})"
                misfit_in = misfit_in or check.name
        yield CheckResult(check.name, outcome, detail, time.perf_counter() - begin)
