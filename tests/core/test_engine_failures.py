"""The engine under bad requests, failures, aborts and shutdown: it lives, or tells why not."""

from __future__ import annotations

import random
import threading
import time

import pytest

from engine_models import (
    VOCAB,
    HistoryModel,
    memory_for,
    run,
    tokens_of,
)
from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import EngineError, RequestError
from llmfw.request import FinishReason, Request
from llmfw.sampling_params import SamplingParams
from tiny_tokenizer import tiny_backend

PROMPTS = [
    [random.Random(seed).randrange(VOCAB) for _ in range(random.Random(seed).randrange(1, 40))]
    for seed in range(16)
]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SEEDED = [SamplingParams(seed=i, top_p=0.9, max_tokens=20) for i in range(len(PROMPTS))]
SMALL = {"kv_cache_memory": memory_for(HistoryModel(), 20), "max_model_len": 64}


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {}, "empty"),
        ([VOCAB], {}, f"token id {VOCAB} in prompt_token_ids is out of range"),
        ([-1], {}, "token id -1"),
        ([1] * 256, {}, "the prompt has 256 tokens"),
        ([1], {"stop_token_ids": [500]}, "token id 500 in stop_token_ids"),
        ([1], {"logit_bias": {500: 1.0}}, "token id 500 in logit_bias"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ([1], {"bad_words": ["x"]}, "need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_lives(engines, prompt, params, text):
    engine = engines()
    with pytest.raises(RequestError, match=text) as caught:
        engine.add_request(Request("x", tuple(prompt), SamplingParams(**params)))
    assert caught.value.hint
    assert len(tokens_of(run(engine, [[1]], GREEDY))[0]) == 20


def test_one_request_with_broken_logits_fails_alone(engines):
    model = HistoryModel()
    plain = model.logits_of
    model.logits_of = lambda tokens, positions: (
        [float("nan")] * VOCAB if tokens[0] == 9 else plain(tokens, positions)
    )
    for depth in (0, 2):
        engine = engines(model, pipeline_depth=depth)
        prompts = [[1, 2], [9, 9], [3, 4]]
        outputs = run(engine, prompts, GREEDY)
        assert [output.outputs[0].finish_reason for output in outputs] == [
            "length",
            "error",
            "length",
        ]
        assert "not finite" in str(outputs[1].error)
        assert engine.stats().failed == 1
        assert len(tokens_of(run(engine, [[1]], GREEDY))[0]) == 20


def test_a_tokenizer_that_fails_ends_its_request_alone(engines):
    class Broken(Tokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            if 5 in token_ids[:1]:
                raise RuntimeError("no such token")
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    engine = engines(tokenizer=Broken(tiny_backend()))
    with pytest.raises(RequestError, match="no such token"):
        engine.add_request(Request("x", (5,), GREEDY))
    good, bad = run(engine, [[1, 2], [3]], [GREEDY, GREEDY.replace(logit_bias={5: 1000.0})])
    assert good.outputs[0].finish_reason == "length"
    assert bad.outputs[0].finish_reason == "error"
    assert isinstance(bad.error, RequestError)
    assert isinstance(bad.error.__cause__, RuntimeError)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failing_step_tells_all_that_wait_with_the_cause(engines, depth):
    model = HistoryModel()

    def fail(metadata):
        if max(metadata.kv_lens) > 10:
            raise ZeroDivisionError("boom")

    model.before_step = fail
    engine = engines(model, pipeline_depth=depth)
    waiting = [engine.add_request(Request(str(i), (1, 2), GREEDY)) for i in range(3)]
    for generation in waiting:
        with pytest.raises(EngineError, match="boom") as caught:
            generation.result(timeout=30)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineError, match="boom"):
        engine.add_request(Request("later", (1,), GREEDY))


def test_ids_of_live_requests_are_unique(engines):
    engine = engines()
    first = engine.add_request(Request("a", (1,), SamplingParams(max_tokens=200)))
    with pytest.raises(RequestError, match="already under way"):
        engine.add_request(Request("a", (1,), GREEDY))
    first.abort()
    first.result(timeout=30)
    engine.add_request(Request("a", (1,), GREEDY)).result(timeout=30)


def slow(model: HistoryModel) -> HistoryModel:
    model.before_step = lambda metadata: time.sleep(0.002)
    return model


@pytest.mark.parametrize("depth", [0, 2])
def test_abort_running_and_waiting(engines, depth):
    model = slow(HistoryModel())
    engine = engines(model, max_num_seqs=1, pipeline_depth=depth)
    long = SamplingParams(temperature=0, max_tokens=200)
    running, waiting, last = (engine.add_request(Request(str(i), (1, i), long)) for i in range(3))
    while running.timings.first_token is None:
        time.sleep(0.001)
    waiting.abort()
    running.abort()
    for generation in (running, waiting):
        assert generation.result(timeout=30).outputs[0].finish_reason == FinishReason.ABORT
    made = running.result().outputs[0].token_ids
    assert made == model.expected([1, 0], len(made))
    assert 0 < len(made) < 200
    assert last.result(timeout=30).outputs[0].token_ids == model.expected([1, 2], 200)
    engine.abort("unknown")
    stats = engine.stats()
    assert (stats.aborted, stats.finished, stats.kv_blocks_used) == (2, 1, 0)


def test_aborts_at_random_from_many_threads(engines):
    model = HistoryModel()
    engine = engines(model, **SMALL, pipeline_depth=1, max_num_batched_tokens=16)
    wrong = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
            count = rng.randrange(1, 25)
            params = SamplingParams(temperature=0, max_tokens=count)
            generation = engine.add_request(Request(engine.new_request_id(), tuple(prompt), params))
            if rng.random() < 0.4:
                time.sleep(rng.random() * 0.01)
                generation.abort()
            completion = generation.result(timeout=60).outputs[0]
            made = completion.token_ids
            if made != model.expected(prompt, len(made)) or (
                completion.finish_reason == "length" and len(made) != count
            ):
                wrong.append((prompt, completion))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    stats = engine.stats()
    assert stats.finished + stats.aborted == 48
    assert stats.kv_blocks_used == 0
    engine._scheduler.check()


def test_stats(engines):
    engine = engines()
    run(engine, [list(range(10)), list(range(10))], GREEDY)
    stats = engine.stats()
    assert (stats.requests, stats.finished, stats.prompt_tokens, stats.generated_tokens) == (
        2,
        2,
        20,
        40,
    )
    assert (stats.waiting, stats.running, stats.kv_usage) == (0, 0, 0.0)
    assert stats.prefix_hit_rate == 0.4
    assert stats.as_dict()["steps"] == stats.steps > 0


def test_streams_give_every_token_once(engines):
    tokenizer = Tokenizer(tiny_backend())
    model = slow(HistoryModel())
    engine = engines(model, tokenizer=tokenizer)
    generation = engine.add_request(Request("s", (1, 2), GREEDY), streaming=True)
    outputs = list(generation)
    assert len(outputs) > 5
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    joined = "".join(output.outputs[0].text_diff for output in outputs)
    tokens = [token for output in outputs for token in output.outputs[0].token_ids_diff]
    assert tokens == outputs[-1].outputs[0].token_ids == model.expected([1, 2], 20)
    assert joined == outputs[-1].outputs[0].text == tokenizer.decode(tokens)


def test_leaving_a_stream_aborts(engines):
    engine = engines(slow(HistoryModel()))
    generation = engine.add_request(
        Request("s", (1, 2), SamplingParams(max_tokens=200)), streaming=True
    )
    stream = iter(generation)
    next(stream)
    stream.close()
    assert generation.result(timeout=30).outputs[0].finish_reason == "abort"


def test_shutdown_ends_what_is_under_way(engines):
    engine = engines(slow(HistoryModel()))
    generation = engine.add_request(Request("s", (1, 2), SamplingParams(max_tokens=200)))
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        generation.result(timeout=30)
    with pytest.raises(EngineError, match="shut down"):
        engine.add_request(Request("t", (1,), GREEDY))
    assert not engine._thread.is_alive()
