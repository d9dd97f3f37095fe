"""`--run-profiling`: the same prompts again and again, timed."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from llmfw_cli.session import Session

if TYPE_CHECKING:
    from llmfw import SamplingParams

WARM_UP = 2


def profile(
    session: Session, prompts: list[Any], params: SamplingParams, repeats: int
) -> dict[str, Any]:
    """Latency of answering all prompts at once, and tokens a second; the first runs do not count.

    Tokens are those of the completions that come out, so with beams not those of beams that died.
    """
    seconds: list[float] = []
    tokens = 0
    for number in range(WARM_UP + repeats):
        started = time.perf_counter()
        answers = session.llm.generate(prompts, params)
        elapsed = time.perf_counter() - started
        if number >= WARM_UP:
            seconds.append(elapsed)
            tokens += sum(len(output.token_ids) for one in answers for output in one.outputs)
    return {
        "warm_up": WARM_UP,
        "repeats": repeats,
        "batch_size": len(prompts),
        "latency_s": {
            "mean": round(statistics.fmean(seconds), 6),
            "median": round(statistics.median(seconds), 6),
            "min": round(min(seconds), 6),
            "max": round(max(seconds), 6),
        },
        "output_tokens": tokens // repeats,
        "output_tokens_per_s": round(tokens / sum(seconds), 2),
    }


def profile_line(measured: dict[str, Any]) -> str:
    """The same for people."""
    latency = measured["latency_s"]
    return (
        f"batch size {measured['batch_size']}: latency {latency['mean']:.4f} s on average of "
        f"{measured['repeats']} runs ({latency['min']:.4f} to {latency['max']:.4f}), "
        f"{measured['output_tokens_per_s']:.1f} tokens/s"
    )
