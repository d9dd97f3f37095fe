"""Beam search through the engine equals a plain one, however it is batched, cached and computed."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from engine_models import (
    VOCAB,
    HistoryModel,
    RecurrentModel,
    StatelessModel,
    TinyAttentionModel,
    memory_for,
    run,
    tokens_of,
)
from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import RequestError, UsageError
from llmfw.request import FinishReason, Request
from llmfw.sampling_params import SamplingParams
from tiny_tokenizer import tiny_backend

PROMPTS = [
    [random.Random(seed).randrange(VOCAB) for _ in range(random.Random(seed).randrange(1, 30))]
    for seed in range(6)
]
ENDS = (3, 50, 71)
BEAMS = SamplingParams(num_beams=4, n=4, max_tokens=14, stop_token_ids=ENDS)


class Found(NamedTuple):
    tokens: list[int]
    total: np.float32
    score: np.float32


def plain_search(model: HistoryModel, prompt: list[int], params: SamplingParams) -> list[Found]:
    """Beam search from its description: every step looks at every token of every beam."""
    width, ends, most = params.num_beams, set(params.stop_token_ids), params.max_tokens
    running = [Found([], np.float32(0), np.float32(0))]
    finished: list[Found] = []
    while True:
        options = []
        for beam in running:
            known = [*prompt, *beam.tokens]
            logits = torch.tensor([model.logits_of(known, range(len(known)))])
            logprobs = logits.float().log_softmax(-1)[0].numpy()
            for token in np.argsort(-logprobs, kind="stable"):
                total = np.float32(beam.total + logprobs[token])
                options.append(([*beam.tokens, int(token)], total))
        options.sort(key=lambda option: -option[1])
        running = []
        for rank, (tokens, total) in enumerate(options[: (1 + len(ends)) * width]):
            if tokens[-1] in ends or len(tokens) == most:
                if rank < width:
                    finished.append(Found(tokens, total, score(total, len(tokens), params)))
            elif len(running) < width:
                running.append(Found(tokens, total, np.float32(0)))
        finished = sorted(finished, key=lambda beam: -beam.score)[:width]
        if not running:
            return finished
        if len(finished) == width:
            length = len(running[0].tokens)
            if params.early_stopping == "never" and params.length_penalty > 0:
                length = most
            hoped = score(running[0].total, length, params)
            if params.early_stopping is True or hoped <= finished[-1].score:
                return finished


def score(total: np.float32, length: int, params: SamplingParams) -> np.float32:
    return np.float32(total / np.float32(length**params.length_penalty))


def check(engine, prompts, outputs, params, model) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.error is None
        expected = plain_search(model, prompt, params)[: params.n]
        assert [c.token_ids for c in output.outputs] == [beam.tokens for beam in expected]
        totals = [float(beam.total) for beam in expected]
        assert [c.cumulative_logprob for c in output.outputs] == totals
    engine._scheduler.check()


VARIANTS = {
    "plain": {},
    "overlapped": {"pipeline_depth": 1},
    "deep": {"pipeline_depth": 3, "max_num_batched_tokens": 9},
    "chunked": {"max_num_batched_tokens": 3},
    "unchunked": {"enable_chunked_prefill": False, "max_num_batched_tokens": 32},
    "without prefix cache": {"enable_prefix_caching": False},
    "blocks of one": {"block_size": 1},
    "large blocks": {"block_size": 32},
    "one at a time": {"max_num_seqs": 4},
    "a small cache": {"kv_cache_memory": memory_for(HistoryModel(), 40), "max_model_len": 64},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_are_those_of_a_plain_search(engines, variant):
    model = HistoryModel()
    engine = engines(model, **VARIANTS[variant])
    check(engine, PROMPTS, run(engine, PROMPTS, BEAMS), BEAMS, model)


@pytest.mark.parametrize(
    "how",
    [
        {"length_penalty": 0.0, "early_stopping": "never"},
        {"length_penalty": 2.0, "early_stopping": True},
        {"length_penalty": -1.0},
        {"length_penalty": 1.5, "early_stopping": "never"},
        {"num_beams": 2, "n": 1},
        {"num_beams": 7, "n": 3},
    ],
    ids=str,
)
def test_scores_and_ends(engines, how):
    params = BEAMS.replace(**how)
    model = HistoryModel()
    engine = engines(model)
    check(engine, PROMPTS, run(engine, PROMPTS, params), params, model)


@pytest.mark.parametrize("groups", [0, 1])
def test_recurrent_state_follows_the_beams(engines, groups):
    model = RecurrentModel(groups=groups)
    engine = engines(model)
    check(engine, PROMPTS, run(engine, PROMPTS, BEAMS), BEAMS, model)


def test_a_search_and_its_neighbours_do_not_disturb_each_other(engines):
    """Beams are never preempted; requests beside them are, and come out as ever."""
    model = HistoryModel()
    memory = memory_for(model, 44)
    engine = engines(model, kv_cache_memory=memory, max_model_len=64, max_num_seqs=16)
    greedy = SamplingParams(temperature=0, max_tokens=25)
    prompts = [PROMPTS[i % 6] for i in range(18)]
    params = [BEAMS if i % 3 == 0 else greedy for i in range(18)]
    outputs = run(engine, prompts, params)
    check(engine, prompts[::3], outputs[::3], BEAMS, model)
    others = [i for i in range(18) if i % 3]
    expected = [model.expected(prompts[i], 25) for i in others]
    assert tokens_of([outputs[i] for i in others]) == expected
    assert engine.stats().preemptions > 0
    engine._scheduler.check()


def test_blocks_are_shared_and_given_back(engines):
    model = HistoryModel()
    engine = engines(model)
    held: list[int] = []
    model.before_step = lambda metadata: held.append(engine._scheduler.pool.num_used)
    prompt = [1] * 31
    params = SamplingParams(num_beams=4, max_tokens=10)
    run(engine, [prompt], params)
    shared, longest = 31 // 4, -(-41 // 4)
    assert max(held) == shared + 4 * (longest - shared) < 4 * longest
    again = run(engine, [prompt], params)
    assert again[0].num_cached_tokens == 28, "the prompt's blocks stay in the prefix cache"
    assert engine._scheduler.pool.num_used == 0


def test_edits_of_the_sampler_count_in_the_scores(engines):
    model = TinyAttentionModel()
    engine = engines(model)
    free = run(engine, PROMPTS, BEAMS.replace(stop_token_ids=None))
    banned = [(pair[0], pair[1]) for pair in (out.outputs[0].token_ids[:2] for out in free)]
    params = BEAMS.replace(stop_token_ids=None, bad_words=banned, min_tokens=3)
    outputs = run(engine, PROMPTS, params)
    for prompt, before, output in zip(PROMPTS, free, outputs, strict=True):
        assert output.outputs[0].token_ids != before.outputs[0].token_ids
        for completion in output.outputs:
            tokens = [*prompt, *completion.token_ids]
            pairs = set(zip(tokens[len(prompt) - 1 :], tokens[len(prompt) :], strict=False))
            assert not pairs & set(banned)


def test_logprobs_follow_the_beams(engines):
    engine = engines(TinyAttentionModel())
    params = BEAMS.replace(logprobs=2, prompt_logprobs=0)
    for output in run(engine, PROMPTS, params):
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        assert all(output.prompt_logprobs[1:])
        for completion in output.outputs:
            assert len(completion.logprobs) == len(completion.token_ids)
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            total = sum(step[token].logprob for token, step in steps)
            assert total == pytest.approx(completion.cumulative_logprob, abs=1e-4)
            assert all(2 <= len(step) <= 3 for step in completion.logprobs)


def test_stop_strings_end_beams(engines):
    tokenizer = Tokenizer(tiny_backend())
    engine = engines(TinyAttentionModel(vocab=tokenizer.vocab_size), tokenizer=tokenizer)
    ids = tokenizer.encode("the cat")
    params = SamplingParams(num_beams=3, n=3, max_tokens=20)
    free = run(engine, [ids], params)[0]
    stop = free.outputs[0].text[2:4]
    for output in run(engine, [ids], params.replace(stop=stop))[0].outputs:
        assert stop not in output.text
        assert (output.finish_reason == "stop") == (output.stop_reason == stop)
        assert output.finish_reason == "stop" or len(output.token_ids) == 20
    assert run(engine, [ids], params.replace(stop=stop))[0].outputs[0].finish_reason == "stop"


def test_an_abort_frees_the_beams(engines):
    model = HistoryModel()
    engine = engines(model, pipeline_depth=1)
    endless = SamplingParams(num_beams=4, max_tokens=None)
    steps: list[int] = []
    generation = engine.add_request(Request("beams", (1, 2, 3), endless))
    model.before_step = lambda metadata: (
        steps.append(1) or (engine.abort("beams") if len(steps) == 8 else None)
    )
    assert generation.result(timeout=60).outputs[0].finish_reason == FinishReason.ABORT
    check(engine, PROMPTS, run(engine, PROMPTS, BEAMS), BEAMS, model)
    assert engine.stats().aborted == 1
    assert engine._scheduler.pool.num_used == 0


def test_without_a_cache_and_up_to_the_length_of_the_model(engines):
    engine = engines(StatelessModel(), max_model_len=24)
    output = run(engine, [[1, 2, 3]], SamplingParams(num_beams=3, n=3, max_tokens=None))[0]
    assert [len(each.token_ids) for each in output.outputs] == [21] * 3
    assert {each.finish_reason for each in output.outputs} == {"length"}


def test_a_cache_that_holds_few_tokens_shortens_the_search(engines):
    model = HistoryModel()
    engine = engines(model, kv_cache_memory=memory_for(model, 20), max_model_len=64)
    output = run(engine, [[5] * 10], SamplingParams(num_beams=4, max_tokens=None))[0]
    assert len(output.outputs[0].token_ids) == (2 + (20 - 2) // 4) * 4 - 10
    with pytest.raises(RequestError, match="holds no 8 beams"):
        run(engine, [[5] * 63], SamplingParams(num_beams=8))
    with pytest.raises(RequestError, match="num_beams is 9, at most 8 sequences"):
        run(engine, [[5]], SamplingParams(num_beams=9))
    engine._scheduler.check()


def test_what_cannot_be_found_is_left_out(engines):
    """Four beams where only two tokens are allowed, and one step to find them."""
    engine = engines(HistoryModel())
    forbidden = [(token,) for token in range(VOCAB) if token not in (7, 9)]
    params = SamplingParams(num_beams=4, n=4, max_tokens=1, bad_words=forbidden)
    output = run(engine, [[1, 2]], params)[0]
    assert sorted(each.token_ids for each in output.outputs) == [[7], [9]]
    longer = run(engine, [[1, 2]], params.replace(max_tokens=3))[0]
    assert len(longer.outputs) == 4
    assert {token for each in longer.outputs for token in each.token_ids} == {7, 9}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_beams": 2, "n": 3}, r"n \(3\) is greater than num_beams \(2\)"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature=0.5 draws, num_beams=2 searches"),
        ({"num_beams": 2, "top_k": 5}, "top_k=5 draws"),
        ({"num_beams": 0}, "num_beams=0 is out of range"),
        ({"early_stopping": "soon"}, "early_stopping='soon' is out of range"),
        ({"length_penalty": float("inf")}, "length_penalty=inf is out of range"),
        ({"num_beams": 2, "return_generation_logits": True}, "does not go with num_beams"),
    ],
)
def test_parameters_that_do_not_go_together(fields, text):
    with pytest.raises(UsageError, match=text):
        SamplingParams(**fields)


def test_what_a_checkpoint_says_of_draws_is_not_for_beams():
    told = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    for params in (
        SamplingParams(num_beams=2, n=2).resolved(told),
        SamplingParams.from_generation_config(told, num_beams=2, n=2),
    ):
        assert (params.temperature, params.top_p, params.repetition_penalty) == (0.0, 1.0, 1.1)
