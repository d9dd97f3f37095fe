"""Timed runs of a workload, by our engine or by a peer, and their comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmfw.errors import EngineError
from llmfw_cli.bench.workload import Workload

if TYPE_CHECKING:
    from llmfw import LLM


@dataclass(frozen=True)
class Timing:
    """One run of a workload.

    Args:
        first_token_s: Seconds until the earliest first token.
        total_s: Seconds until everything was done.
    """

    first_token_s: float
    total_s: float


class Runner(Protocol):
    """Something that can run a workload."""

    def run(self, workload: Workload) -> Timing:
        """Run it and check that every prompt got its new tokens."""


class Ours:
    """llmfw itself.

    Args:
        llm: The loaded model.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def run(self, workload: Workload) -> Timing:
        """Run it through `LLM.generate`, greedy, end tokens ignored.

        Raises:
            EngineError: If a prompt got another number of tokens than asked for.
        """
        from llmfw import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            repetition_penalty=1.0,
            max_tokens=workload.new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        started = time.perf_counter()
        outputs = self._llm.generate([list(prompt) for prompt in workload.prompts], params)
        total = time.perf_counter() - started
        firsts: list[float] = []
        for output in outputs:
            check_length(len(output.outputs[0].token_ids), workload.new_tokens)
            firsts.append(output.timings.first_token or started)
        return Timing(min(firsts) - started, total)


def check_length(made: int, asked: int) -> None:
    """Refuse a measurement of fewer (or more) tokens than asked for.

    Raises:
        EngineError: If the numbers differ.
    """
    if made != asked:
        raise EngineError(
            f"a benchmark asked for {asked} tokens and got {made}",
            hint="the prompt and the new tokens must fit into --max-model-len",
        )


@dataclass(frozen=True)
class Figures:
    """The median of several runs.

    Args:
        workload: Its name.
        runs: Timed runs.
        first_token_s: Seconds to the first token.
        total_s: Seconds to the end.
        prefill_tokens_per_s: Prompt tokens over the time to the first token; of one prompt only.
        decode_tokens_per_s: New tokens after the first, over the time after it; of one prompt only.
        tokens_per_s: All new tokens over the whole time.
    """

    workload: str
    runs: int
    first_token_s: float
    total_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    tokens_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Rounded to four digits."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def measure(runner: Runner, workloads: list[Workload], *, warmups: int = 1) -> Figures:
    """Run `warmups` of the workloads untimed, then the rest; the median of each figure.

    Args:
        runner: What runs them.
        workloads: Equal in shape, different in tokens, so that no cache of prompts helps.
        warmups: How many of them are not counted.
    """
    return measure_in_turn([runner], workloads, warmups=warmups)[0]


def measure_in_turn(
    runners: Sequence[Runner], workloads: list[Workload], *, warmups: int = 1
) -> list[Figures]:
    """As `measure`; each workload by every runner before the next, so a busy hour meets all."""
    timings: list[list[Timing]] = [[] for _ in runners]
    for number, workload in enumerate(workloads):
        for runner, kept in zip(runners, timings, strict=True):
            timing = runner.run(workload)
            if number >= warmups:
                kept.append(timing)
    return [_figures(workloads[0], kept) for kept in timings]


def _figures(workload: Workload, timings: list[Timing]) -> Figures:
    first = statistics.median(each.first_token_s for each in timings)
    total = statistics.median(each.total_s for each in timings)
    single = len(workload.prompts) == 1
    after = statistics.median(each.total_s - each.first_token_s for each in timings)
    decode = (workload.new_tokens - 1) / after if single and workload.new_tokens > 1 else None
    return Figures(
        workload=workload.name,
        runs=len(timings),
        first_token_s=first,
        total_s=total,
        prefill_tokens_per_s=workload.prompt_tokens / first if single else None,
        decode_tokens_per_s=decode,
        tokens_per_s=workload.total_new_tokens / total,
    )
