"""The engine: takes requests from any thread and steps in one of its own while there is work."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from llmfw.engine.beam_search import BeamSearch
from llmfw.engine.completion import Completion, decode_one, logprob_entry
from llmfw.engine.executor import Executor
from llmfw.engine.generation import Generation
from llmfw.engine.intake import Arrival, Intake, TextCodec
from llmfw.engine.model_runner import RunnerFacts
from llmfw.engine.scheduler import Scheduler, SchedulerConfig
from llmfw.engine.settings import EngineSettings
from llmfw.engine.stats import Counters, EngineStats
from llmfw.engine.step import StepInput, StepOutput, TokenLogprobs
from llmfw.errors import EngineError, RequestError
from llmfw.request import FinishReason, Request

logger = logging.getLogger("llmfw.engine")

_JOIN_SECONDS = 30.0


class LLMEngine:
    """Continuous batching over one executor.

    Args:
        executor: Runs the steps.
        settings: Settings settled for the device.
        tokenizer: For text and stop strings, or None.
        eos_ids: The checkpoint's end-of-sequence tokens.
        vocab_size: Token ids are below it; None: not checked.
    """

    def __init__(
        self,
        executor: Executor,
        settings: EngineSettings,
        *,
        tokenizer: TextCodec | None = None,
        eos_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
    ) -> None:
        self.facts: RunnerFacts = executor.call("facts")
        self.settings = settings
        self._executor = executor
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(scheduler_config(self.facts, settings))
        self._intake = Intake(
            self._scheduler,
            settings.seed,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            vocab_size=vocab_size,
        )
        self._counters = Counters()
        self._generations: dict[str, Generation] = {}
        self._by_seq: dict[int, tuple[Generation, Completion | BeamSearch]] = {}
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._names: set[str] = set()  # ids of live requests, those in the inbox included
        self._name_numbers = itertools.count()  # `next` of it is safe in any thread
        self._closing = False
        self._failure: BaseException | None = None
        self._in_flight: deque[Future[StepOutput]] = deque()
        self._thread = threading.Thread(target=self._run, name="llmfw-engine", daemon=True)
        self._thread.start()
        atexit.register(self.shutdown)

    # Any thread.

    def add_request(self, request: Request, *, streaming: bool = False) -> Generation:
        """Queue a request; `streaming` wakes the reader for every token.

        Raises:
            RequestError: If it cannot be served; nothing is queued then.
            EngineError: If the engine has stopped.
        """
        arrival = self.take(request, streaming=streaming)
        self.start([arrival])
        return arrival.generation

    def take(self, request: Request, *, streaming: bool = False) -> Arrival:
        """Check a request and make it ready for `start`.

        Raises:
            RequestError: If it cannot be served.
        """
        return self._intake.take(request, self.abort, streaming=streaming)

    def start(self, arrivals: Sequence[Arrival]) -> None:
        """Queue requests that `take` made ready; the next step sees all of them.

        Raises:
            RequestError: If a request of the same id is under way; none is queued then.
            EngineError: If the engine has stopped.
        """
        names = [arrival.generation.request_id for arrival in arrivals]
        with self._wake:
            if self._closing:
                raise self._stopped_error()
            for name in names:
                if name in self._names:
                    raise RequestError(
                        f"a request {name!r} is already under way", hint="choose another request_id"
                    )
            self._names.update(names)
            self._inbox += [functools.partial(self._start, arrival) for arrival in arrivals]
            self._wake.notify()

    def new_request_id(self) -> str:
        """An id that no other request of this engine has had from here."""
        while (name := str(next(self._name_numbers))) in self._names:
            pass
        return name

    def abort(self, request_id: str) -> None:
        """End a request as it stands; one that is finished or unknown is left alone."""
        with self._wake:
            self._inbox.append(lambda: self._abort(request_id))
            self._wake.notify()

    def stats(self) -> EngineStats:
        """A snapshot; taken without stopping the engine, so numbers may be a step apart."""
        scheduler, counters = self._scheduler, self._counters
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            requests=counters.requests,
            finished=counters.finished,
            aborted=counters.aborted,
            failed=counters.failed,
            steps=counters.steps,
            preemptions=scheduler.stats.preemptions,
            kv_blocks=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            prefix_queries=scheduler.stats.prefix_queries,
            prefix_hits=scheduler.stats.prefix_hits,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
        )

    def shutdown(self, *, wait: bool = True) -> None:
        """Stop: requests under way end with an EngineError. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if wait and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as exc:
            self._stop(exc)
        else:
            self._stop(None)
        # Last of all: a process that ends while the model is being freed has to wait for it.
        atexit.unregister(self.shutdown)

    def _take_inbox(self) -> bool:
        """Wait for work; False when the engine is to stop."""
        with self._wake:
            while not (self._inbox or self._closing or self._in_flight or self._scheduler.has_work):
                self._wake.wait()
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
        for action in inbox:
            action()
        return True

    def _step(self) -> None:
        """Submit the next step; read the oldest in flight when enough are."""
        depth = self.settings.pipeline_depth or 0
        step = self._scheduler.schedule()
        if step is not None:
            self._counters.steps += 1
            if step.new:
                self._note_started(step)
            self._in_flight.append(self._executor.submit(step))
        if self._in_flight and (step is None or len(self._in_flight) > depth):
            self._receive(self._in_flight.popleft().result())
        elif step is None and self._scheduler.has_work:
            raise EngineError("the scheduler has work but no step; this is a fault of the engine")

    def _start(self, arrival: Arrival) -> None:
        generation, search = arrival.generation, arrival.search
        request = generation.request
        self._counters.requests += 1
        self._counters.prompt_tokens += len(request.prompt_token_ids)
        self._generations[request.request_id] = generation
        if search is not None:
            self._scheduler.add_beams(arrival.sequences)
            self._by_seq.update(dict.fromkeys(generation.seq_ids, (generation, search)))
            return
        for completion, sequence in zip(generation.completions, arrival.sequences, strict=True):
            self._scheduler.add(sequence)
            self._by_seq[sequence.seq_id] = (generation, completion)

    def _note_started(self, step: StepInput) -> None:
        now = time.perf_counter()
        for new in step.new:
            entry = self._by_seq[new.seq_id]
            if entry[0].timings.scheduled is None:
                entry[0].timings.scheduled = now
                cached = self._scheduler.running[new.seq_id].num_cached
                entry[0].num_cached_tokens = cached or 0

    def _receive(self, output: StepOutput) -> None:
        for seq_id, (start, entries) in output.prompt_logprobs.items():
            self._note_prompt_logprobs(seq_id, start, entries)
        for seq_id, (start, rows) in output.context_logits.items():
            if seq_id in self._by_seq:
                with self._by_seq[seq_id][0].lock:
                    self._by_seq[seq_id][0].note_context_logits(start, rows)
        by_seq = self._by_seq
        for seq_id, token in zip(output.seq_ids, output.token_ids, strict=True):
            entry = by_seq.get(seq_id)
            if entry is None:
                continue  # ended while the step was in flight
            generation, receiver = entry
            try:
                if token < 0:
                    raise _no_token()
                if isinstance(receiver, BeamSearch):
                    self._offer(generation, receiver, seq_id, output)
                else:
                    self._push(generation, receiver, seq_id, token, output)
            except Exception as exc:
                self._fail(generation, exc)

    def _push(
        self,
        generation: Generation,
        completion: Completion,
        seq_id: int,
        token: int,
        output: StepOutput,
    ) -> None:
        self._scheduler.receive(seq_id, token)
        self._counters.generated_tokens += 1
        timings = generation.timings
        with generation.lock:
            if timings.first_token is None:
                timings.first_token = time.perf_counter()
                timings.first_step = self._step_read
            if output.logprobs or output.logits:
                completion.push(token, output.logprobs.get(seq_id), output.logits.get(seq_id))
            else:
                completion.push(token)
            if completion.finish_reason is None:
                if generation.streamed:
                    generation.tell()
                return
        self._scheduler.finish(seq_id)
        del self._by_seq[seq_id]
        if all(other.finish_reason is not None for other in generation.completions):
            self._finish(generation)
        else:
            with generation.lock:
                generation.tell()

    def _offer(
        self, generation: Generation, search: BeamSearch, seq_id: int, output: StepOutput
    ) -> None:
        """Give a search the candidates of one of its beams; with those of the last it goes on."""
        if not search.offer(seq_id, output.candidates[seq_id]):
            return
        moves = search.advance()
        self._counters.generated_tokens += max(1, len(moves))
        with generation.lock:
            if generation.timings.first_token is None:
                generation.timings.first_token = time.perf_counter()
                generation.timings.first_step = self._step_read
            if not moves:
                search.fill(generation.completions)
        if moves:
            self._scheduler.fork(moves)
        else:
            self._release(generation)
            self._finish(generation)

    def _finish(self, generation: Generation) -> None:
        self._counters.finished += 1
        self._drop(generation)
        generation.timings.last_step = self._step_read
        generation.end()

    @property
    def _step_read(self) -> int:
        """The number of the step whose output is read now."""
        return self._counters.steps - len(self._in_flight)

    def _note_prompt_logprobs(self, seq_id: int, start: int, entries: list[TokenLogprobs]) -> None:
        generation = self._by_seq[seq_id][0] if seq_id in self._by_seq else None
        if generation is None or generation.prompt_logprobs is None:
            return
        prompt = generation.request.prompt_token_ids
        with generation.lock:
            for position, logprobs in enumerate(entries, start=start):
                entry = logprob_entry(prompt[position], logprobs, self._decode_one)
                generation.prompt_logprobs[position] = entry

    def _decode_one(self, token: int) -> str | None:
        return decode_one(self._tokenizer, token)

    def _abort(self, request_id: str) -> None:
        generation = self._generations.get(request_id)
        if generation is not None:
            self._counters.aborted += 1
            self._release(generation)
            self._drop(generation)
            try:
                generation.end(FinishReason.ABORT)
            except Exception as exc:  # the tokenizer's, at the last piece of text
                generation.end(FinishReason.ERROR, _as_request_error(generation, exc))

    def _fail(self, generation: Generation, exc: Exception) -> None:
        """End one request with an error; the others go on."""
        self._counters.failed += 1
        self._release(generation)
        self._drop(generation)
        generation.end(FinishReason.ERROR, _as_request_error(generation, exc))

    def _release(self, generation: Generation) -> None:
        for seq_id in generation.seq_ids:
            if self._by_seq.pop(seq_id, None) is not None:
                self._scheduler.finish(seq_id)

    def _drop(self, generation: Generation) -> None:
        del self._generations[generation.request_id]
        with self._wake:
            self._names.discard(generation.request_id)

    def _stop(self, cause: BaseException | None) -> None:
        """Tell all that wait, let the worker go."""
        with self._wake:
            self._failure = cause
            self._closing = True
            inbox, self._inbox = self._inbox, []
        for action in inbox:  # so that those who were not yet seen are told too
            action()
        self._in_flight.clear()
        for generation in list(self._generations.values()):
            generation.end(FinishReason.ERROR, self._stopped_error())
        self._generations.clear()
        self._by_seq.clear()
        if cause is not None:
            logger.error("the engine stopped: %r", cause)
        self._executor.shutdown()

    def _stopped_error(self) -> EngineError:
        if self._failure is None:
            return EngineError("the engine was shut down", hint="make a new LLM")
        hint = getattr(self._failure, "hint", None) or "make a new LLM"
        error = EngineError(f"the engine stopped: {self._failure!r}", hint=hint)
        error.__cause__ = self._failure
        return error


def scheduler_config(facts: RunnerFacts, settings: EngineSettings) -> SchedulerConfig:
    """What the scheduler may do, from the worker's facts and the settings."""
    assert settings.max_num_batched_tokens is not None
    return SchedulerConfig(
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        max_model_len=facts.max_model_len,
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=settings.enable_prefix_caching and facts.shares_prefixes,
        enable_chunked_prefill=settings.enable_chunked_prefill,
    )


def _no_token() -> RequestError:
    return RequestError(
        "the model's logits are not finite, or logit_bias and bad_words leave no token",
        hint="try dtype float32; check the checkpoint and the request's parameters",
    )


def _as_request_error(generation: Generation, exc: Exception) -> RequestError:
    if isinstance(exc, RequestError):
        return exc
    logger.error("request %s failed", generation.request_id, exc_info=exc)
    error = RequestError(f"request {generation.request_id} failed: {exc!r}")
    error.__cause__ = exc
    return error
