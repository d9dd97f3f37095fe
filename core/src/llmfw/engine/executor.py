"""Who runs the steps: an executor takes step inputs and gives futures of step outputs, in order."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.step import StepInput, StepOutput
from llmfw.ops.memory import told_of_memory

_CURES = ("make a new LLM with a lower max_num_batched_tokens, max_num_seqs or kv_cache_memory",)


class Executor(Protocol):
    """One or many workers seen as one. Steps run in the order in which they were submitted."""

    def submit(self, step: StepInput) -> Future[StepOutput]:
        """Start a step; several may be in flight. A failure is the future's exception."""

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of every worker and return rank 0's result; for what is rare."""

    def shutdown(self) -> None:
        """Let the workers go; may be called twice."""


class InProcessExecutor:
    """Runs the steps in the calling thread; a step is read when its future is asked for it.

    On a GPU Python's garbage collector leaves alone what lives before the first step, until
    `shutdown`: going through all of torch's modules takes it 0.1 to 0.3 s, in which no step starts.

    Args:
        runner: The worker.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner: ModelRunner | None = runner
        if runner.device.type == "cuda":
            gc.collect()
            gc.freeze()

    def submit(self, step: StepInput) -> Future[StepOutput]:
        """Launch the step now; waiting for its tokens is left to `result`."""
        assert self.runner is not None, "the executor was shut down"
        try:
            return LazyFuture(self.runner.launch(step).read)
        except Exception as exc:
            failed: Future[StepOutput] = Future()
            device = self.runner.device
            failed.set_exception(told_of_memory(exc, "a step", device, *_CURES))
            return failed

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker."""
        assert self.runner is not None, "the executor was shut down"
        return getattr(self.runner, method)(*args)

    def shutdown(self) -> None:
        """Drop the worker and with it the model and its caches."""
        on_gpu = self.runner is not None and self.runner.device.type == "cuda"
        self.runner = None
        if on_gpu:  # graphs and steps refer to each other: without this their memory stays taken
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()


class LazyFuture(Future[StepOutput]):
    """A future that computes its result in the thread that asks for it.

    Args:
        read: Waits for the result and returns it; called once.
    """

    def __init__(self, read: Callable[[], StepOutput]) -> None:
        super().__init__()
        self._read: Callable[[], StepOutput] | None = read

    def result(self, timeout: float | None = None) -> StepOutput:
        """The output; `timeout` is not looked at, for the step runs on its own."""
        read, self._read = self._read, None
        if read is not None:
            try:
                self.set_result(read())
            except Exception as exc:
                self.set_exception(exc)
        return super().result(timeout)
