"""The time of a decode step by batch and context, and of prefill by prompt length."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmfw.errors import EngineError
from llmfw_cli.bench.costs import ModelCosts
from llmfw_cli.bench.measure import Ours
from llmfw_cli.bench.workload import fixed

if TYPE_CHECKING:
    from llmfw import LLM


@dataclass(frozen=True)
class DecodePoint:
    """A decode step.

    Args:
        batch: Requests of it.
        context: Tokens of each prompt.
        step_ms: Its median time.
        floor_ms: The time of reading what it has to read, at the measured bandwidth.
        of_floor: The floor over the time; 1.0 cannot be beaten.
        tokens_per_s: New tokens a second at that pace.
        read_gb: What it has to read, in 1e9 bytes.
        first_ms: Median time to the earliest first token of such a batch.
        runs: Timed pairs of runs.
    """

    batch: int
    context: int
    step_ms: float
    floor_ms: float
    of_floor: float
    tokens_per_s: float
    read_gb: float
    first_ms: float
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
        """Every batch at every context, each as the difference of a long and a short run.

        The difference is free of prefill and of steps in which some requests are still read.

        Args:
            batches: Requests of a step.
            contexts: Tokens of each prompt.
            new_tokens: Of the long run; the short one makes half as many.
            bandwidth: Bytes a second of reading memory, for the floor.

        Raises:
            EngineError: If the cache does not hold the batch, or too few tokens came: then the
                batch would not be that large in every step.
        """
        for context in contexts:
            for batch in batches:
                yield self._decode(batch, context, new_tokens, bandwidth)

    def _decode(self, batch: int, context: int, new: int, bandwidth: float) -> DecodePoint:
        short = new // 2
        steps, firsts = [], []
        for number in range(self._warmups + self._runs):
            first, short_s = self._seconds(batch, context, short)
            _, long_s = self._seconds(batch, context, new)
            if number >= self._warmups:
                steps.append((long_s - short_s) / (new - short))
                firsts.append(first)
        seconds = statistics.median(steps)
        if seconds <= 0:
            raise EngineError(
                f"{new} tokens took no longer than {short}: the machine is too busy to tell",
                hint="raise --new-tokens or --runs",
            )
        # the steps that count write tokens new/2 to new, 3/4 on the mean
        nbytes = self._costs.decode_bytes(batch, context + 0.75 * new)
        floor = nbytes / bandwidth
        return DecodePoint(
            batch=batch,
            context=context,
            step_ms=1e3 * seconds,
            floor_ms=1e3 * floor,
            of_floor=floor / seconds,
            tokens_per_s=batch / seconds,
            read_gb=nbytes / 1e9,
            first_ms=1e3 * statistics.median(firsts),
            runs=len(steps),
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
            runs = [self._seconds(batch, length, 1) for _ in range(self._warmups + self._runs)]
            seconds = statistics.median(total for _, total in runs[self._warmups :])
            rate = self._costs.prefill_operations(length, batch) / seconds
            yield PrefillPoint(
                batch=batch,
                prompt=length,
                ms=1e3 * seconds,
                tokens_per_s=batch * length / seconds,
                tflops=rate / 1e12,
                of_matrix_rate=rate / matrix_rate,
                runs=self._runs,
            )

    def _seconds(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        """Of the first token and of a whole run."""
        blocks = self._llm.stats().kv_blocks
        size = self._llm.loaded.model_config.block_size
        needed = batch * -(-(prompt + new) // size)
        if 0 < blocks < needed:
            raise EngineError(
                f"{batch} requests of {prompt} + {new} tokens need {needed} blocks of the KV "
                f"cache together, it has {blocks}",
                hint="raise --kv-cache-memory, or lower the batch or the context",
            )
        timing = self._ours.run(fixed(batch, prompt, new, self._vocab, next(self._seeds)))
        return timing.first_token_s, timing.total_s
