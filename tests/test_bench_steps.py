"""`llmfw bench decode`: the time of steps in which all requests decode, of a fake engine."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw.errors import EngineError
from llmfw.plugins import unregister_local
from llmfw.request import Timings
from llmfw_cli.bench import measure
from llmfw_cli.bench.measure import RequestTime
from llmfw_cli.bench.steps import DecodePoint, StepBench, full_steps

PROMPT, A_TOKEN = 100, 8


class OneWeight(torch.nn.Module):
    """16 bytes of weights, `A_TOKEN` bytes of K and V a token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def cache_specs(self) -> dict[str, Any]:
        return {"": SimpleNamespace(bytes_per_token=A_TOKEN, window=None)}

    def state_specs(self) -> dict[str, Any]:
        return {}


@dataclass
class FakeLLM:
    """An engine with a clock of its own: at most `width` prompts are read in a step, at any pace.

    waits: Whether the first request waits a step before its last token.
    """

    width: int
    waits: bool = False
    now: float = 0.0
    step: int = 7  # of earlier work
    random: random.Random = field(default_factory=lambda: random.Random(0))
    contexts: list[list[int]] = field(default_factory=list)  # of full steps, a run each
    totals: list[float] = field(default_factory=list)

    loaded = SimpleNamespace(model=OneWeight(), model_config=SimpleNamespace(block_size=16))

    def step_s(self, requests: int) -> float:
        """Seconds of decoding so many requests."""
        return 1.0 + requests / 16

    def stats(self) -> Any:
        return SimpleNamespace(kv_blocks=0)

    def generate(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        begun, new, waits = self.now, params[0].max_tokens, self.waits
        timings = [Timings() for _ in prompts]
        made = [0] * len(prompts)
        full: list[int] = []
        while min(made) < new:
            self.step += 1
            decoding = [i for i, count in enumerate(made) if 0 < count < new]
            if waits and made[0] == new - 1:
                decoding, waits = decoding[1:], False
            unread = [i for i, count in enumerate(made) if not count]
            read = unread[: self.random.randint(1, self.width)]
            self.now += self.step_s(len(decoding)) if decoding else 0.0
            self.now += sum(self.random.uniform(0.1, 9.0) for _ in read)
            if len(decoding) == len(prompts):
                full += [len(prompts[i]) + made[i] for i in decoding]
            for i in (*read, *decoding):
                made[i] += 1
                if made[i] == 1:
                    timings[i].first_token, timings[i].first_step = self.now, self.step
                if made[i] == new:
                    timings[i].finished, timings[i].last_step = self.now, self.step
        self.contexts.append(full)
        self.totals.append(self.now - begun)
        return [
            SimpleNamespace(
                error=None, timings=each, outputs=[SimpleNamespace(token_ids=[0] * new)]
            )
            for each in timings
        ]


def decode(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, *, batch: int, new: int, runs: int = 3
) -> DecodePoint:
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: llm.now))
    bench = StepBench(llm, 50, runs=runs, warmups=1)  # type: ignore[arg-type]
    return next(bench.decode((batch,), (PROMPT,), new, bandwidth=1e3))


@pytest.mark.parametrize(
    ("batch", "width", "new"), [(1, 1, 2), (5, 5, 4), (12, 3, 16), (12, 1, 16)]
)
def test_a_step_is_timed_without_the_prompts(
    monkeypatch: pytest.MonkeyPatch, batch: int, width: int, new: int
) -> None:
    """Requests begin staggered over up to 12 steps, and reading them takes any time."""
    llm = FakeLLM(width)
    point = decode(llm, monkeypatch, batch=batch, new=new)
    assert point.step_ms == pytest.approx(1e3 * llm.step_s(batch))
    assert point.tokens_per_s == pytest.approx(batch / llm.step_s(batch))
    assert point.spread == pytest.approx(0.0, abs=1e-9)
    timed = llm.contexts[1:]
    assert point.steps == min(map(len, timed)) // batch > 0
    assert point.runs == len(timed) == 3
    # the floor is for the contexts of these very steps
    context = statistics.mean(statistics.mean(each) for each in timed)
    assert 1e9 * point.read_gb == pytest.approx(16 + batch * A_TOKEN * context)
    assert point.floor_ms == pytest.approx(1e9 * point.read_gb)
    if width == 1:  # equally many in every step
        assert context == PROMPT + new / 2


def test_whole_runs_do_not_tell_a_step() -> None:
    """Why: the difference of two runs has the reading of prompts in it, which takes any time."""
    llm = FakeLLM(3)
    for new in (16, 8) * 5:
        llm.generate([[0] * PROMPT] * 12, [SimpleNamespace(max_tokens=new)])
    steps = [
        (long - short) / 8 for long, short in zip(llm.totals[::2], llm.totals[1::2], strict=True)
    ]
    assert max(steps) - min(steps) > 0.5 * llm.step_s(12)


def test_the_spread_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM(4)
    pace = iter((9.0, 1.0, 1.0, 1.2))  # of each run, the first to warm up
    generate = llm.generate

    def paced(prompts: Any, params: Any) -> Any:
        seconds = next(pace)
        monkeypatch.setattr(llm, "step_s", lambda _: seconds)
        return generate(prompts, params)

    monkeypatch.setattr(llm, "generate", paced)
    point = decode(llm, monkeypatch, batch=4, new=8)
    assert point.step_ms == pytest.approx(1000.0)
    assert point.spread == pytest.approx(0.2)


def test_no_figure_without_a_step_of_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="12 requests of 100 tokens begin over 12 steps") as told:
        decode(FakeLLM(1), monkeypatch, batch=12, new=12)
    assert told.value.hint is not None
    assert "--new-tokens well above 12" in told.value.hint
    assert decode(FakeLLM(1), monkeypatch, batch=12, new=13).steps == 1


def test_no_figure_where_a_request_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="some of 4 requests waited"):
        decode(FakeLLM(4, waits=True), monkeypatch, batch=4, new=8, runs=1)


def test_prompts_that_are_read_longer_than_the_first_request_decodes(
    tiny_model: Path,  # noqa: F811
) -> None:
    load = [
        "--batch",
        "8",
        "--context",
        "40",
        "--new-tokens",
        "4",
        "--max-num-batched-tokens",
        "48",
    ]
    try:
        done = run("bench", "decode", *tiny_arguments(tiny_model), *load, "--runs", "1")
    finally:
        unregister_local("TinyForCausalLM")
    assert done.exit_code == EngineError.exit_code
    assert "the first is done when the last begins" in done.stderr
    assert done.stdout == ""


def test_both_ends_are_the_beginning_of_a_steps_output() -> None:
    """Requests of one step are noted one after the other: the first of each end counts."""
    times = [
        RequestTime(1.0, 6.0, 3, 10, 12),
        RequestTime(2.00, 7.00, 3, 11, 13),
        RequestTime(2.25, 7.25, 3, 11, 13),
    ]
    found = full_steps(times, 50)
    assert (found.steps, found.seconds) == (1, 4.0)
    assert found.context == pytest.approx(50 + (2 + 1 + 1) / 3)
