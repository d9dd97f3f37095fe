"""A request under way as its caller sees it: wait for it, stream it, await it, abort it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from llmfw.engine.completion import Completion
from llmfw.errors import EngineError, LlmfwError
from llmfw.request import FinishReason, Logprob, Request, RequestOutput, Timings


class Generation:
    """The handle of one request.

    `result()` waits for the whole output, a `for` loop gives an output whenever there is more of
    it, and `await` and `async for` do the same for coroutines. An output that comes late holds all
    that came meanwhile, so nothing is lost when the reader is slow. One reader at a time.

    Args:
        request: The request.
        completions: Its n completions.
        seq_ids: Its sequences in scheduler and worker: one a completion, or the beams of a search.
        abort: Called with the request's id to abort it.
        streamed: Whether the reader is woken for every token.
    """

    def __init__(
        self,
        request: Request,
        completions: list[Completion],
        seq_ids: tuple[int, ...],
        abort: Callable[[str], None],
        *,
        streamed: bool = False,
    ) -> None:
        self.request = request
        self.completions = completions
        self.seq_ids = seq_ids
        self.timings = Timings(arrival=request.arrival)
        self.num_cached_tokens = 0
        self.error: LlmfwError | None = None
        self.finished = False
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(request.prompt_token_ids)
        self.context_logits: np.ndarray | None = None
        self._abort = abort
        self.lock = threading.RLock()  # held while completions change
        self._changed = threading.Condition(self.lock)
        self.streamed = streamed
        self._news = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    def abort(self) -> None:
        """End it as it stands, with finish_reason "abort"."""
        self._abort(self.request_id)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end and return the whole output, which may carry an `error`.

        Raises:
            EngineError: If the engine stopped.
            TimeoutError: After `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
        return self._output(advance=False)

    def __iter__(self) -> Iterator[RequestOutput]:
        """Outputs as they come (with `streamed`); leaving the loop early aborts the request."""
        try:
            last = False
            while not last:
                with self._changed:
                    self._changed.wait_for(lambda: self._news or self.finished)
                    self._news, last = False, self.finished
                yield self._output(advance=True)
        finally:
            if not self.finished:
                self.abort()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    async def aresult(self) -> RequestOutput:
        """Like `result`, for coroutines; raises the request's error; cancelling aborts it."""
        event = self._listen()
        try:
            while not self.finished:
                await event.wait()
                event.clear()
        finally:
            if not self.finished:
                self.abort()
        output = self._output(advance=False)
        if output.error is not None:
            raise output.error
        return output

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Like the `for` loop, for coroutines; raises the request's error."""
        event = self._listen()
        try:
            last = False
            while not last:
                while not (self._news or self.finished):
                    await event.wait()
                    event.clear()
                with self._changed:
                    self._news, last = False, self.finished
                output = self._output(advance=True)
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not self.finished:
                self.abort()

    # The engine's side.

    def note_context_logits(self, start: int, rows: np.ndarray) -> None:
        """Keep rows [tokens, vocab] of the prompt's logits from `start` on; held: `lock`."""
        if self.context_logits is None:
            shape = (len(self.request.prompt_token_ids), rows.shape[1])
            self.context_logits = np.empty(shape, dtype=np.float32)
        self.context_logits[start : start + len(rows)] = rows

    def tell(self) -> None:
        """Wake the reader; held: `lock`."""
        if self.finished or self.streamed:
            self._news = True
            self._changed.notify_all()
            for loop, event in self._waiters:
                with suppress(RuntimeError):  # the reader's loop is closed
                    loop.call_soon_threadsafe(event.set)

    def end(self, reason: FinishReason | None = None, error: LlmfwError | None = None) -> None:
        """Finish whatever is not, for `reason` or with an `error`, and wake the reader."""
        with self._changed:
            if self.finished:
                return
            self.error = error
            for completion in self.completions:
                if completion.finish_reason is None:
                    completion.finish(reason or FinishReason.ERROR)
            self.finished = True
            self.timings.finished = time.perf_counter()
            self.tell()

    def _listen(self) -> asyncio.Event:
        event = asyncio.Event()
        with self._changed:
            self._waiters.append((asyncio.get_running_loop(), event))
            if self.finished or self._news:
                event.set()
        return event

    def _output(self, *, advance: bool) -> RequestOutput:
        with self._changed:
            if isinstance(self.error, EngineError):
                raise EngineError(
                    self.error.message, hint=self.error.hint
                ) from self.error.__cause__
            return RequestOutput(
                request_id=self.request_id,
                prompt=self.request.prompt,
                prompt_token_ids=list(self.request.prompt_token_ids),
                outputs=[completion.output(advance=advance) for completion in self.completions],
                finished=self.finished,
                prompt_logprobs=self.prompt_logprobs,
                num_cached_tokens=self.num_cached_tokens,
                timings=self.timings,
                error=self.error,
                context_logits=self.context_logits,
            )
