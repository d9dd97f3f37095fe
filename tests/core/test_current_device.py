"""Work on a GPU other than torch's current one; fakes stand for the GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine_models import CPU, HistoryModel
from llmfw.engine import cuda_graphs, model_runner
from llmfw.engine.cuda_graphs import StepGraphs
from llmfw.engine.decode_step import DecodeOutput
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.engine.step import Chunk, NewRequest, StepInput
from llmfw.ops.device import as_current
from llmfw.sampling_params import SamplingParams
from llmfw.weights.device_reader import _Stage


def test_a_gpu_is_the_current_one_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    with as_current(torch.device("cuda", 1)):
        assert current == [1]
    assert current == [0]
    with as_current(CPU):
        assert current == [0]


def test_a_step_runs_with_the_workers_device_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = HistoryModel()
    runner = ModelRunner(model, EngineSettings(block_size=4, max_num_seqs=2).on("cpu"), CPU)
    current: list[torch.device] = []

    @contextmanager
    def fake(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    seen: list[list[torch.device]] = []
    monkeypatch.setattr(model_runner, "as_current", fake)
    model.before_step = lambda metadata: seen.append(list(current))
    request = NewRequest(1, (1, 2, 3), SamplingParams(temperature=0).resolved())
    runner.launch(StepInput(1, (Chunk(1, 0, 3, True, (0,), True),), 0, (request,)))
    assert seen == [[CPU]]
    assert current == []


def test_a_buffer_waits_for_the_stream_of_the_device_it_was_copied_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FakeEvent:
        recorded: object = None

        def record(self, stream: object) -> None:
            self.recorded = stream

    stage = _Stage(CPU, 64)
    event = FakeEvent()
    stage._copied = event  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    out = torch.empty(4)
    stage.copy_to(out, torch.ones(4))
    assert event.recorded == ("stream of", CPU)
    assert torch.equal(out, torch.ones(4))


def test_all_captures_of_an_engine_take_one_stream_of_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams: list[object] = []
    modes: list[object] = []

    class FakeStream:
        def wait_stream(self, other: object) -> None:
            pass

    class FakeGraph:
        def pool(self) -> str:
            return "pool"

    @contextmanager
    def capture(
        graph: object, pool: object, stream: object, capture_error_mode: str
    ) -> Iterator[None]:
        streams.append(stream)
        modes.append((pool, capture_error_mode))
        yield

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        streams.append(stream)
        yield

    for name, fake in (
        ("Stream", FakeStream),
        ("current_stream", FakeStream),
        ("CUDAGraph", FakeGraph),
        ("graph", capture),
        ("stream", on),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda_graphs, "unowned", lambda x: x)
    output = DecodeOutput(torch.empty(0), torch.empty(0))
    graphs = StepGraphs.__new__(StepGraphs)
    graphs._pool = graphs._stream = None
    step = SimpleNamespace(compute=lambda: output)
    for _ in range(2):
        graphs._capture(step)
    assert len(streams) == 4
    assert len(set(streams)) == 1
    assert modes == [(None, "thread_local"), ("pool", "thread_local")]
