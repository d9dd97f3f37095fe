"""Both engines over all samples, in turn: what they wrote, how good it is and how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmfw.engine.tokenizer import Tokenizer
from llmfw_cli.output import Progress
from llmfw_cli.summarize.engines import Engine
from llmfw_cli.summarize.scores import Scores, mean_scores


@dataclass(frozen=True)
class Task:
    """One sample, ready for the engines.

    Args:
        prompt: Token ids.
        reference: The summary that a person wrote.
        scored: The prompt and that summary, as token ids, for perplexity.
        article: The number of the article that it is made of.
    """

    prompt: list[int]
    reference: str
    scored: list[int]
    article: int = 0


@dataclass(frozen=True)
class Summary:
    """What an engine made of a sample; rouge in points of 100."""

    token_ids: list[int]
    text: str
    rouge: Scores


@dataclass
class EngineRun:
    """What one engine did.

    Args:
        name: Of the engine.
        summaries: One a sample.
        seconds: One a batch.
        log_likelihoods: One a sample, where perplexity is wanted.
        scored_tokens: How many log probabilities each of them sums.
    """

    name: str
    summaries: list[Summary] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    log_likelihoods: list[float] = field(default_factory=list)
    scored_tokens: list[int] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """Tokens of all summaries."""
        return sum(len(each.token_ids) for each in self.summaries)

    @property
    def rouge(self) -> Scores:
        """The mean of each kind."""
        return mean_scores([each.rouge for each in self.summaries])

    @property
    def perplexity(self) -> float | None:
        """Of all scored tokens together."""
        if not self.log_likelihoods:
            return None
        return math.exp(-sum(self.log_likelihoods) / sum(self.scored_tokens))

    @property
    def losses(self) -> list[float]:
        """Each sample's negative log likelihood a token, in nats."""
        pairs = zip(self.log_likelihoods, self.scored_tokens, strict=True)
        return [-total / count for total, count in pairs]

    def as_json(self) -> dict[str, Any]:
        """The figures of the whole run."""
        total = sum(self.seconds)
        return {
            "rouge": {kind: round(value, 4) for kind, value in self.rouge.items()},
            "perplexity": self.perplexity,
            "new_tokens": self.new_tokens,
            "total_s": round(total, 4),
            "latency_s": round(total / len(self.seconds), 4),
            "tokens_per_s": round(self.new_tokens / total, 2),
        }


def run_engines(
    engines: Sequence[Engine],
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    rouge: Callable[[str, str], Scores],
    *,
    batch_size: int,
    perplexity: bool,
    progress: Progress | None = None,
) -> list[EngineRun]:
    """Give every batch to each engine; who is first changes, so that neither has the quiet hours.

    One batch before them is not counted: kernels are compiled then.
    """
    runs = {engine.name: EngineRun(engine.name) for engine in engines}
    for engine in engines:
        engine.complete([list(reversed(tasks[0].prompt))])
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        turn = start // batch_size % len(engines)
        for engine in (*engines[turn:], *engines[:turn]):
            run = runs[engine.name]
            began = time.perf_counter()
            made = engine.complete([task.prompt for task in batch])
            run.seconds.append(time.perf_counter() - began)
            for task, tokens in zip(batch, made, strict=True):
                text = tokenizer.decode(tokens).strip()
                run.summaries.append(Summary(tokens, text, rouge(task.reference, text)))
            if perplexity:
                run.log_likelihoods += [engine.log_likelihood(task.scored) for task in batch]
                run.scored_tokens += [len(task.scored) - 1 for task in batch]
        if progress is not None:
            progress(start + len(batch), len(tasks), "summarizing")
    return list(runs.values())
