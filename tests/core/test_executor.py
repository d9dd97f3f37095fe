from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from engine_models import CPU, HistoryModel
from llmfw.engine.executor import InProcessExecutor, LazyFuture
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.engine.step import Chunk, NewRequest, StepInput, StepOutput
from llmfw.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0).resolved()


def executor(model: HistoryModel) -> InProcessExecutor:
    settings = EngineSettings(block_size=4, max_num_seqs=2).on("cpu")
    return InProcessExecutor(ModelRunner(model, settings, CPU))


def prompt_step(prompt=(1, 2, 3)) -> StepInput:
    chunk = Chunk(1, 0, len(prompt), True, (0,), True)
    return StepInput(1, (chunk,), 0, (NewRequest(1, tuple(prompt), GREEDY),))


def test_steps_in_flight_are_read_later():
    model = HistoryModel()
    made = executor(model)
    futures = [made.submit(prompt_step())]
    futures += [
        made.submit(StepInput(2 + i, (Chunk(1, 3 + i, 1, True, (1,) if i == 1 else ()),), 1))
        for i in range(3)
    ]
    outputs = [future.result() for future in futures]
    assert [output.step_id for output in outputs] == [1, 2, 3, 4]
    assert [output.token_ids[0] for output in outputs] == model.expected([1, 2, 3], 4)
    assert all(future.done() for future in futures)


def test_a_failing_step_is_the_futures_exception():
    model = HistoryModel()

    def fail(metadata):
        raise RuntimeError("boom")

    model.before_step = fail
    future = executor(model).submit(prompt_step())
    with pytest.raises(RuntimeError, match="boom"):
        future.result()


def test_lazy_future_reads_once_and_keeps_the_failure():
    calls = []

    def read() -> StepOutput:
        calls.append(1)
        raise ValueError("late")

    future = LazyFuture(read)
    for _ in range(2):
        with pytest.raises(ValueError, match="late"):
            future.result()
    assert calls == [1]


def test_call_and_shutdown():
    made = executor(HistoryModel())
    assert made.call("facts").block_size == 4
    made.shutdown()
    made.shutdown()
    assert made.runner is None


def test_collections_spare_what_lives_before_the_first_step_on_a_gpu():
    runner = SimpleNamespace(device=torch.device("cuda"))
    gc.unfreeze()
    made = InProcessExecutor(runner)
    assert gc.get_freeze_count() > 10_000
    made.shutdown()
    assert gc.get_freeze_count() == 0
    executor(HistoryModel())
    assert gc.get_freeze_count() == 0
