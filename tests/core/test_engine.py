from __future__ import annotations

import random

import pytest

from engine_models import (
    VOCAB,
    HistoryModel,
    StatelessModel,
    TinyAttentionModel,
    memory_for,
    run,
    tokens_of,
)
from llmfw.engine.tokenizer import Tokenizer
from llmfw.sampling_params import SamplingParams
from tiny_tokenizer import tiny_backend

PROMPTS = [
    [random.Random(seed).randrange(VOCAB) for _ in range(random.Random(seed).randrange(1, 40))]
    for seed in range(16)
]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SEEDED = [SamplingParams(seed=i, top_p=0.9, max_tokens=20) for i in range(len(PROMPTS))]
SMALL = {"kv_cache_memory": memory_for(HistoryModel(), 20), "max_model_len": 64}

VARIANTS = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 7},
    "unchunked": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
    "overlapped": {"pipeline_depth": 1},
    "preempted and unchunked": {
        **SMALL,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 40,
    },
    "deep and chunked": {"pipeline_depth": 3, "max_num_batched_tokens": 9},
    "preempted": SMALL,
    "preempted and overlapped": {**SMALL, "pipeline_depth": 2},
    "preempted and chunked": {**SMALL, "max_num_batched_tokens": 11},
    "without prefix cache": {**SMALL, "enable_prefix_caching": False},
    "blocks of one": {"block_size": 1},
    "one at a time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_tokens_are_the_same_however_they_are_computed(engines, variant, groups):
    settings = dict(VARIANTS[variant])
    if "kv_cache_memory" in settings:
        settings["kv_cache_memory"] *= groups
    model = HistoryModel(groups=groups)
    engine = engines(model, **settings)
    outputs = run(engine, PROMPTS, GREEDY)
    assert tokens_of(outputs) == [model.expected(prompt, 20) for prompt in PROMPTS]
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    assert bool(engine.stats().preemptions) == variant.startswith(("preempted", "without"))
    engine._scheduler.check()
    assert engine.stats().kv_blocks_used == 0


def test_attention_ragged_equals_singles_and_seeds_hold_in_any_batch(engines):
    engine = engines(TinyAttentionModel())
    for params in ([GREEDY] * len(PROMPTS), SEEDED):
        together = tokens_of(run(engine, PROMPTS, params))
        for settings in (
            {"max_num_seqs": 1},
            VARIANTS["chunked"],
            VARIANTS["preempted and chunked"],
        ):
            settings = {**settings, "kv_cache_memory": "40KiB", "max_model_len": 64}
            assert (
                tokens_of(run(engines(TinyAttentionModel(), **settings), PROMPTS, params))
                == together
            )


def test_seeds_make_the_draws(engines):
    engine = engines()
    prompt = [[1, 2, 3]]
    draws = [
        tokens_of(run(engine, prompt, SamplingParams(temperature=1.0, seed=s, max_tokens=12)))[0]
        for s in (1, 1, 2, None, None)
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
    again = engines(seed=0)
    params = SamplingParams(temperature=1.0, max_tokens=12)
    repeat = [tokens_of(run(again, prompt, params))[0] for _ in range(2)]
    assert repeat == draws[3:]  # the engine's seed makes the others


def test_prefix_hit_equals_miss(engines):
    model = HistoryModel()
    engine = engines(model)
    prompt = list(range(30))
    first, second = (run(engine, [prompt], GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 28
    assert tokens_of([first]) == tokens_of([second]) == [model.expected(prompt, 20)]
    longer = prompt + first.outputs[0].token_ids[:10]
    third = run(engine, [longer], GREEDY)[0]
    assert third.num_cached_tokens == 36
    assert third.outputs[0].token_ids == model.expected(longer, 20)
    assert engine.stats().prefix_hits == 64


def test_completions_of_one_prompt_share_it(engines):
    engine = engines()
    prompt = list(range(17))
    output = run(engine, [prompt], SamplingParams(n=4, seed=5, max_tokens=10))[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    assert engine.stats().prefix_hits == 3 * 16
    alone = run(engine, [prompt], SamplingParams(seed=5, max_tokens=10))[0]
    assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_model_without_cache(engines):
    two = SamplingParams(temperature=0, max_tokens=2)
    assert tokens_of(run(engines(StatelessModel()), [[5], [7, 8]], two)) == [[15, 46], [25, 77]]


def test_more_requests_than_places(engines):
    model = HistoryModel()
    prompts = [[i % VOCAB, i // VOCAB] for i in range(150)]
    outputs = run(
        engines(model, max_num_seqs=3), prompts, SamplingParams(temperature=0, max_tokens=2)
    )
    assert tokens_of(outputs) == [model.expected(prompt, 2) for prompt in prompts]


# When it ends.


def test_ends(engines):
    model = HistoryModel()
    expected = model.expected([1, 2, 3], 60)
    eos, stop = expected[4], expected[9]
    engine = engines(model, eos_ids=frozenset({eos}))

    def end(**params):
        completion = run(engine, [[1, 2, 3]], SamplingParams(temperature=0, **params))[0].outputs[0]
        made = len(completion.token_ids)
        if not params.get("min_tokens"):
            assert completion.token_ids == expected[:made]
        return made, completion.finish_reason, completion.stop_reason

    assert end(max_tokens=50) == (5, "stop", None)
    assert end(max_tokens=5) == (5, "stop", None)
    assert end(max_tokens=4) == (4, "length", None)
    assert end(max_tokens=50, ignore_eos=True) == (50, "length", None)
    assert end(max_tokens=50, ignore_eos=True, stop_token_ids=[stop]) == (
        expected.index(stop) + 1,
        "stop",
        stop,
    )
    made, reason, _ = end(max_tokens=50, min_tokens=20)
    assert made > 20 or (made, reason) == (50, "length")
    made, reason, _ = end(max_tokens=30, min_tokens=30)
    assert (made, reason) == (30, "length")


def test_no_stop_token_before_min_tokens(engines):
    model = HistoryModel()
    stop = model.expected([1, 2, 3], 1)[0]
    engine = engines(model, eos_ids=frozenset({stop}))
    for params in ({}, {"seed": 3, "temperature": 5.0}):
        params = SamplingParams(**{"temperature": 0, **params}, min_tokens=8, max_tokens=40)
        tokens = run(engine, [[1, 2, 3]], params)[0].outputs[0].token_ids
        assert stop not in tokens[:8]
        assert len(tokens) >= 8


def test_the_models_length_ends_it(engines):
    engine = engines(max_model_len=32)
    for limit in (None, 1000):
        output = run(engine, [list(range(20))], SamplingParams(temperature=0, max_tokens=limit))[0]
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].finish_reason == "length"
    assert len(run(engine, [list(range(31))], GREEDY)[0].outputs[0].token_ids) == 1


def test_text_and_stop_strings(engines):
    tokenizer = Tokenizer(tiny_backend())
    engine = engines(tokenizer=tokenizer)
    free = run(engine, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
    assert free.text == tokenizer.decode(free.token_ids)
    stop = free.text[7:10]
    cut = free.text[: free.text.index(stop)]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=40, stop=["\x00", stop], include_stop_str_in_output=include
        )
        completion = run(engine, [[1, 2, 3]], params)[0].outputs[0]
        assert completion.text == cut + (stop if include else "")
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
    silent = run(engine, [[1, 2, 3]], SamplingParams(temperature=0, detokenize=False))[0].outputs[0]
    assert (silent.text, len(silent.token_ids)) == ("", 32)


def test_text_of_the_stop_token(engines):
    tokenizer = Tokenizer(tiny_backend())
    model = HistoryModel()
    tokens = model.expected([1, 2, 3], 5)
    engine = engines(model, tokenizer=tokenizer)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, stop_token_ids=[tokens[4]], include_stop_str_in_output=include,
            skip_special_tokens=False,
        )  # fmt: skip
        completion = run(engine, [[1, 2, 3]], params)[0].outputs[0]
        assert completion.token_ids == tokens
        shown = tokens if include else tokens[:4]
        assert completion.text == tokenizer.decode(shown, skip_special_tokens=False)


def test_bad_words_never_come(engines):
    tokenizer = Tokenizer(tiny_backend())
    engine = engines(tokenizer=tokenizer)
    free = run(engine, [[1, 2, 3]], GREEDY)[0].outputs[0].text
    words = [free[0], free[3:5]]
    text = (
        run(engine, [[1, 2, 3]], GREEDY.replace(bad_words=words, max_tokens=100))[0].outputs[0].text
    )
    assert len(text) > 90
    assert not any(word in text for word in words)


def test_bad_words_that_the_model_has_no_tokens_for_change_nothing(engines):
    class Larger(Tokenizer):
        """A tokenizer with a token that the model lacks."""

        def encode(self, text, *, add_special_tokens=True):
            return [VOCAB]

    free = run(engines(), [[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    engine = engines(tokenizer=Larger(tiny_backend()))
    banned = run(engine, [[1, 2, 3]], GREEDY.replace(bad_words=["word"]))[0]
    assert banned.outputs[0].token_ids == free


def test_ends_that_the_model_has_no_tokens_for_change_nothing(engines, caplog):
    free = run(engines(), [[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    engine = engines(eos_ids=frozenset({VOCAB, -1}))
    assert "the model has no token 97, which is to end its sequences" in caplog.text
    late = run(engine, [[1, 2, 3]], GREEDY.replace(min_tokens=2))[0].outputs[0]
    assert late.token_ids == free


def test_logprobs_match_the_model(engines):
    tokenizer = Tokenizer(tiny_backend())
    model = TinyAttentionModel()
    for settings in ({}, {"max_num_batched_tokens": 3}, {"pipeline_depth": 1}):
        engine = engines(model, tokenizer=tokenizer, **settings)
        params = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=0, max_tokens=6)
        prompt = list(range(10))
        output = run(engine, [prompt], params)[0]
        completion = output.outputs[0]
        assert len(completion.logprobs) == 6
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            assert (len(entry), entry[token].rank) == (2, 1)
            assert entry[token].decoded_token == tokenizer.decode(
                [token], skip_special_tokens=False
            )
        total = sum(
            entry[t].logprob
            for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        )
        assert completion.cumulative_logprob == pytest.approx(total)
        assert output.prompt_logprobs[0] is None
        assert [list(entry) for entry in output.prompt_logprobs[1:]] == [
            [token] for token in prompt[1:]
        ]
        # The whole text as a prompt says the same of its last tokens.
        whole = run(engine, [prompt + completion.token_ids], params)[0]
        for token, ours, theirs in zip(
            completion.token_ids, completion.logprobs, whole.prompt_logprobs[10:], strict=True
        ):
            assert theirs[token].logprob == pytest.approx(ours[token].logprob, abs=1e-5)
            assert theirs[token].rank == 1


def test_prompt_logprobs_do_not_use_the_prefix_cache_but_fill_it(engines):
    engine = engines(TinyAttentionModel())
    params = SamplingParams(temperature=0, prompt_logprobs=0)
    for _ in range(2):
        output = run(engine, [list(range(20))], params)[0]
        assert output.num_cached_tokens == 0
        assert all(output.prompt_logprobs[1:])
    assert run(engine, [list(range(20))], GREEDY)[0].num_cached_tokens == 16


def test_prompt_logprobs_from_a_token_on_read_the_cache_before_it(engines):
    prompt = list(range(20))
    whole = SamplingParams(temperature=0, prompt_logprobs=1)
    for settings in ({}, {"max_num_batched_tokens": 3}, {"pipeline_depth": 1}):
        engine = engines(TinyAttentionModel(), **settings)
        told = run(engine, [prompt], whole)[0].prompt_logprobs
        for start, cached in ((0, 0), (1, 0), (8, 4), (13, 12), (19, 16), (20, 16), (30, 16)):
            params = whole.replace(prompt_logprobs_start=start)
            output = run(engine, [prompt], params)[0]
            assert output.num_cached_tokens == cached
            assert output.prompt_logprobs[:start] == [None] * min(start, 20)
            for ours, theirs in zip(output.prompt_logprobs[start:], told[start:], strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert list(ours) == list(theirs)
                    values = [entry.logprob for entry in theirs.values()]
                    got = [entry.logprob for entry in ours.values()]
                    assert got == pytest.approx(values, abs=1e-5)


def test_prompt_logprobs_with_several_completions(engines):
    params = SamplingParams(n=2, seed=1, prompt_logprobs=1)
    output = run(engines(TinyAttentionModel()), [[1, 2, 3]], params)[0]
    assert [entry is None for entry in output.prompt_logprobs] == [True, False, False]
    later = params.replace(prompt_logprobs_start=2)
    output = run(engines(TinyAttentionModel()), [[1, 2, 3]], later)[0]
    assert [entry is None for entry in output.prompt_logprobs] == [True, True, False]


def test_timings_are_in_order(engines):
    timings = run(engines(), [[1, 2, 3]], GREEDY)[0].timings
    assert timings.arrival <= timings.scheduled or timings.arrival == 0.0
    assert timings.scheduled <= timings.first_token <= timings.finished


# What goes wrong.


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_are_those_of_the_first_and_the_last_token(engines, depth):
    """Three prompts of four tokens, one a step: read one after the other, then all decode."""
    engine = engines(HistoryModel(), pipeline_depth=depth, max_num_batched_tokens=4)
    run(engine, [[9, 8]], SamplingParams(temperature=0, max_tokens=2))
    before = engine.stats().steps
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    alone = run(engine, [[1, 2, 3, 4]], params)[0].timings
    assert (alone.first_step, alone.last_step) == (before + 1, before + 9)
    timings = [each.timings for each in run(engine, [[5] * 4, [6] * 4, [7] * 4], params)]
    firsts = [each.first_step for each in timings]
    assert before + 9 < firsts[0] < firsts[1] < firsts[2]
    assert [each.last_step for each in timings] == [first + 8 for first in firsts]
    assert engine.stats().steps == timings[-1].last_step
