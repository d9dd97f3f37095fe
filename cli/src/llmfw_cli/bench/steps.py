"""The time of a decode step by batch and context, and of prefill by prompt length."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmfw.errors import EngineError
from llmfw_cli.bench.costs import ModelCosts
from llmfw_cli.bench.measure import Ours, RequestTime, Timing
from llmfw_cli.bench.workload import fixed

if TYPE_CHECKING:
    from llmfw import LLM


@dataclass(frozen=True)
class DecodePoint:
    """A decode step.

    Args:
        batch: Requests of it.
        context: Tokens of each prompt.
        step_ms: Its time: the median over the runs.
        spread: The longest less the shortest of the runs' times, over the median.
        floor_ms: The time of reading what it has to read, at the measured bandwidth.
        of_floor: The floor over the time; 1.0 cannot be beaten.
        tokens_per_s: New tokens a second at that pace.
        read_gb: What it has to read, in 1e9 bytes.
        first_ms: Median time to the earliest first token of such a batch.
        steps: Steps of a run in which all requests decode, which the time is the mean of.
        runs: Timed runs.
    """

    batch: int
    context: int
    step_ms: float
    spread: float
    floor_ms: float
    of_floor: float
    tokens_per_s: float
    read_gb: float
    first_ms: float
    steps: int
    runs: int


@dataclass(frozen=True)
class PrefillPoint:
    """Reading prompts.

    Args:
        batch: Prompts given at once.
        prompt: Tokens of each.
        ms: Median time until every one has its first token.
        tokens_per_s: Prompt tokens a second.
        tflops: Operations a second that the model needs for them, in 1e12.
        of_matrix_rate: Those over the rate of a large matrix product measured in the same run.
        runs: Timed runs.
    """

    batch: int
    prompt: int
    ms: float
    tokens_per_s: float
    tflops: float
    of_matrix_rate: float
    runs: int


@dataclass(frozen=True)
class FullSteps:
    """The steps of a run in which every request decodes.

    Args:
        steps: How many.
        seconds: Of all of them.
        context: Tokens of a request in the cache, in the mean over steps and requests.
    """

    steps: int
    seconds: float
    context: float


def full_steps(requests: Sequence[RequestTime], prompt: int) -> FullSteps:
    """The steps after the last request's first token, up to the first request's last one.

    A request gets a token in every step from its first to its last (which is checked), so each of
    these steps decodes all requests and reads no prompt, however staggered they began. How many
    steps they are is a difference of the engine's numbers, and their time begins and ends where the
    engine began to look at a step's output.

    Args:
        requests: Times of one run's requests, of equal prompts.
        prompt: Tokens of each.

    Raises:
        EngineError: If a request waited in between, or the first ended before the last began.
    """
    if any(each.last_step - each.first_step != each.tokens - 1 for each in requests):
        raise EngineError(
            f"some of {len(requests)} requests waited for others between two of their tokens",
            hint="raise --kv-cache-memory, or lower the batch or the context",
        )
    first = max(each.first_step for each in requests)
    last = min(each.last_step for each in requests)
    if last <= first:
        over = first - min(each.first_step for each in requests) + 1
        raise EngineError(
            f"{len(requests)} requests of {prompt} tokens begin over {over} steps: the first is "
            "done when the last begins, and no step decodes all of them",
            hint=f"raise --new-tokens well above {over} or --max-num-batched-tokens, or lower the "
            "batch",
        )
    begin = min(each.first_token_s for each in requests if each.first_step == first)
    end = min(each.total_s for each in requests if each.last_step == last)
    # in step n a request has its prompt and n - first_step new tokens in the cache
    made = (first + 1 + last) / 2 - statistics.mean(each.first_step for each in requests)
    return FullSteps(last - first, end - begin, prompt + made)


class StepBench:
    """Measures one loaded model.

    Args:
        llm: The model; without prefix caching the figures are plainest, prompts differ anyway.
        vocab_size: Token ids are below it.
        runs, warmups: Timed runs of each figure, and those before them that do not count.
        seed: Of the prompts.
    """

    def __init__(
        self, llm: LLM, vocab_size: int, *, runs: int = 3, warmups: int = 1, seed: int = 0
    ) -> None:
        self._llm = llm
        self._ours = Ours(llm)
        self._vocab = vocab_size
        self._runs, self._warmups = runs, warmups
        self._costs = ModelCosts(llm.loaded.model)
        self._seeds = iter(range(1000 * seed, 1 << 40))

    def decode(
        self, batches: Sequence[int], contexts: Sequence[int], new_tokens: int, bandwidth: float
    ) -> Iterator[DecodePoint]:
        """Every batch at every context, each from the steps in which all its requests decode.

        Args:
            batches: Requests of a step.
            contexts: Tokens of each prompt.
            new_tokens: Of each request; the mean context of the steps is prompt + new_tokens / 2
                where equally many prompts are read in every step, and nearly so elsewhere.
            bandwidth: Bytes a second of reading memory, for the floor.

        Raises:
            EngineError: If the cache does not hold the batch, too few tokens came, or there is no
                step of all requests: then the batch would not be that large in every step.
        """
        for context in contexts:
            for batch in batches:
                yield self._decode(batch, context, new_tokens, bandwidth)

    def _decode(self, batch: int, context: int, new: int, bandwidth: float) -> DecodePoint:
        timings = self._timings(batch, context, new)
        runs = [full_steps(each.requests, context) for each in timings]
        times = [run.seconds / run.steps for run in runs]
        seconds = statistics.median(times)
        nbytes = self._costs.decode_bytes(batch, statistics.mean(run.context for run in runs))
        floor = nbytes / bandwidth
        return DecodePoint(
            batch=batch,
            context=context,
            step_ms=1e3 * seconds,
            spread=(max(times) - min(times)) / seconds,
            floor_ms=1e3 * floor,
            of_floor=floor / seconds,
            tokens_per_s=batch / seconds,
            read_gb=nbytes / 1e9,
            first_ms=1e3 * statistics.median(each.first_token_s for each in timings),
            steps=min(run.steps for run in runs),
            runs=len(runs),
        )

    def prefill(
        self, batch: int, prompts: Sequence[int], matrix_rate: float
    ) -> Iterator[PrefillPoint]:
        """Prompts of each length, one new token each.

        Args:
            batch: Prompts given at once.
            prompts: Their lengths.
            matrix_rate: Operations a second of a large product.
        """
        for length in prompts:
            runs = self._timings(batch, length, 1)
            seconds = statistics.median(each.total_s for each in runs)
            rate = self._costs.prefill_operations(length, batch) / seconds
            yield PrefillPoint(
                batch=batch,
                prompt=length,
                ms=1e3 * seconds,
                tokens_per_s=batch * length / seconds,
                tflops=rate / 1e12,
                of_matrix_rate=rate / matrix_rate,
                runs=len(runs),
            )

    def _timings(self, batch: int, prompt: int, new: int) -> list[Timing]:
        """Runs of equal requests, those to warm up left out, if the cache holds all of them."""
        blocks = self._llm.stats().kv_blocks
        size = self._llm.loaded.model_config.block_size
        needed = batch * -(-(prompt + new) // size)
        if 0 < blocks < needed:
            raise EngineError(
                f"{batch} requests of {prompt} + {new} tokens need {needed} blocks of the KV "
                f"cache together, it has {blocks}",
                hint="raise --kv-cache-memory, or lower the batch or the context",
            )
        runs = [
            self._ours.run(fixed(batch, prompt, new, self._vocab, next(self._seeds)))
            for _ in range(self._warmups + self._runs)
        ]
        return runs[self._warmups :]
