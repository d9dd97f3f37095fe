"""Timed runs of a workload, by our engine or by a peer, and their comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llmfw.errors import EngineError
from llmfw_cli.bench.workload import Workload

if TYPE_CHECKING:
    from llmfw import LLM

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class RequestTime:
    """One request.

    Args:
        first_token_s, total_s: Seconds to its first token and to its end.
        tokens: How many it made.
        first_step, last_step: The engine's steps that made the first and the last of them; 0 where
            the engine does not tell.
    """

    first_token_s: float
    total_s: float
    tokens: int
    first_step: int = 0
    last_step: int = 0

    @property
    def per_token_s(self) -> float | None:
        """Seconds a token after the first; None where there was only one."""
        if self.tokens < 2:
            return None
        return (self.total_s - self.first_token_s) / (self.tokens - 1)


@dataclass(frozen=True)
class Timing:
    """One run of a workload.

    Args:
        first_token_s: Seconds until the earliest first token.
        total_s: Seconds until everything was done.
        requests: Each request's own times, where the engine tells them.
    """

    first_token_s: float
    total_s: float
    requests: tuple[RequestTime, ...] = ()


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

        params = [
            SamplingParams(
                temperature=0.0,
                repetition_penalty=1.0,
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
            )
            for count in workload.new_tokens
        ]
        started = time.perf_counter()
        outputs = self._llm.generate([list(prompt) for prompt in workload.prompts], params)
        total = time.perf_counter() - started
        times: list[RequestTime] = []
        for output, asked in zip(outputs, workload.new_tokens, strict=True):
            if output.error is not None:
                raise output.error
            made = len(output.outputs[0].token_ids)
            check_length(made, asked)
            timings = output.timings
            first = (timings.first_token or started) - started
            end = (timings.finished or started) - started
            steps = timings.first_step or 0, timings.last_step or 0
            times.append(RequestTime(first, end, made, *steps))
        return Timing(min(each.first_token_s for each in times), total, tuple(times))


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
        prompt_tokens, new_tokens: Of the last run.
        first_token_s: Seconds to the first token.
        total_s: Seconds to the end.
        prefill_tokens_per_s: Prompt tokens over the time to the first token; of one prompt only.
        decode_tokens_per_s: New tokens after the first, over the time after it; of one prompt only.
        tokens_per_s: All new tokens over the whole time.
        percentiles: Over the requests of all runs, in milliseconds: "ttft" (time to first token),
            "tpot" (time of each token after it) and "latency" (whole request), each with p50, p90
            and p99. Empty where the engine does not tell.
    """

    workload: str
    runs: int
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    tokens_per_s: float
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Rounded to four digits."""
        return {name: rounded(value) for name, value in asdict(self).items()}


def rounded(value: Any) -> Any:
    """Floats to four digits, inside of mappings and lists as well."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def percentiles_of(times: Sequence[RequestTime]) -> dict[str, dict[str, float]]:
    """Milliseconds by kind and percentile, of the requests that have that kind of time."""
    kinds: dict[str, list[float]] = {
        "ttft": [each.first_token_s for each in times],
        "tpot": [each.per_token_s for each in times if each.per_token_s is not None],
        "latency": [each.total_s for each in times],
    }
    return {
        kind: {f"p{percent}": 1e3 * percentile(values, percent) for percent in PERCENTILES}
        for kind, values in kinds.items()
        if values
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


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
    timings: list[list[tuple[Workload, Timing]]] = [[] for _ in runners]
    for number, workload in enumerate(workloads):
        for runner, kept in zip(runners, timings, strict=True):
            timing = runner.run(workload)
            if number >= warmups:
                kept.append((workload, timing))
    return [_figures(kept) for kept in timings]


def _figures(runs: list[tuple[Workload, Timing]]) -> Figures:
    last, _ = runs[-1]
    timings = [timing for _, timing in runs]
    single = len(last.prompts) == 1
    after = statistics.median(
        (each.total_s - each.first_token_s) / (work.new_tokens[0] - 1)
        if work.new_tokens[0] > 1
        else 0.0
        for work, each in runs
    )
    return Figures(
        workload=last.name,
        runs=len(runs),
        prompt_tokens=last.prompt_tokens,
        new_tokens=last.total_new_tokens,
        first_token_s=statistics.median(each.first_token_s for each in timings),
        total_s=statistics.median(each.total_s for each in timings),
        prefill_tokens_per_s=statistics.median(
            work.prompt_tokens / each.first_token_s for work, each in runs
        )
        if single
        else None,
        decode_tokens_per_s=1 / after if single and after > 0 else None,
        tokens_per_s=statistics.median(work.total_new_tokens / each.total_s for work, each in runs),
        percentiles=percentiles_of([time for each in timings for time in each.requests]),
    )
