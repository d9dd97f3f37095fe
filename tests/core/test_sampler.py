from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import CPU
from llmfw.engine.request_table import RequestTable
from llmfw.engine.sampler import edited, logprobs, sample
from llmfw.engine.sampling_plan import GREEDY, plan_sampling, uniform
from llmfw.engine.step import NewRequest, StepInput
from llmfw.sampling_params import SamplingParams

VOCAB = 40


def plan_for(requests, *, history=(), rows=None):
    """A plan for (SamplingParams, seed, *bad words), each with prompt [1, 2] and a history."""
    table = RequestTable(max(len(requests), 1), 64, 4, CPU)
    news = []
    for index, (params, seed, *words) in enumerate(requests):
        bad = tuple(tuple(word) for word in words)
        news.append(NewRequest(index, (1, 2), params.resolved(), seed, (39,), bad))
    table.apply(StepInput(1, (), 0, tuple(news)))
    rows = np.array([table.row_of[i] for i in range(len(requests))])
    table.tokens[:, 2 : 2 + len(history)] = torch.tensor(history, dtype=torch.int32)
    return plan_sampling(table, rows, np.full(len(rows), 2 + len(history)))


def draws(logits: torch.Tensor, params: SamplingParams, count: int = 20_000) -> torch.Tensor:
    """Frequencies of `count` draws of one request at different positions."""
    table = RequestTable(1, 64, 4, CPU)
    table.apply(StepInput(1, (), 0, (NewRequest(0, (1, 2), params.resolved(), 5),)))
    plan = plan_sampling(table, np.zeros(count, dtype=np.int64), np.arange(count))
    tokens = sample(logits.expand(count, -1), plan)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities by the plain definition: temperature, top_k, top_p, min_p in this order."""
    params = params.resolved()
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True)
    kept = torch.zeros_like(probs, dtype=torch.bool)
    limit = params.top_k if params.top_k > 0 else len(probs)
    chosen = order[:limit]
    total = probs[chosen].sum()
    before = 0.0
    for token in chosen:
        if before < params.top_p * total or params.top_p == 1.0:
            kept[token] = True
        before += float(probs[token])
    kept &= probs >= params.min_p * probs.max()
    probs = probs * kept
    return probs / probs.sum()


@pytest.fixture(scope="module")
def logits():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.7, "temperature": 1.3},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 0.8},
    ],
)
def test_draws_follow_the_distribution(logits, params):
    count = 20_000
    params = SamplingParams(**params)
    wanted = reference(logits, params)
    seen = draws(logits, params, count)
    assert not (seen[wanted == 0] > 0).any()
    deviation = (wanted * (1 - wanted) / count).sqrt()
    assert ((seen - wanted).abs() <= 4.5 * deviation + 1e-9).all()


def test_greedy_is_argmax_and_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sample(logits.to(dtype), GREEDY).tolist() == [1, 0]


def test_greedy_rows_among_random_ones(logits):
    requests = [
        (SamplingParams(temperature=0), 1),
        (SamplingParams(temperature=1.0), 2),
        (SamplingParams(temperature=0), 3),
    ]
    tokens = sample(logits.expand(3, -1), plan_for(requests))
    best = int(logits.argmax())
    assert tokens[0] == tokens[2] == best


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 63),
    st.sampled_from([{"temperature": 1.0}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.3}]),
)
def test_a_draw_does_not_depend_on_the_batch(seed, filters):
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(seed % 1000))
    mine = (SamplingParams(**filters), seed)
    alone = sample(logits[2:3], plan_for([mine]))
    others = [
        (SamplingParams(temperature=0), 1),
        (SamplingParams(top_p=0.5, top_k=7), 2),
        mine,
        (SamplingParams(repetition_penalty=2.0, min_p=0.4), 3),
        (SamplingParams(temperature=2.0, presence_penalty=1.0), 4),
    ]
    assert sample(logits, plan_for(others))[2] == alone[0]


def test_uniform_numbers_are_uniform_and_distinct():
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200), 200)
    numbers = uniform(seeds, positions)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == len(numbers)
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert abs(((counts - 800) ** 2 / 800).sum() - 49) < 5 * np.sqrt(2 * 49)
    grid = numbers.reshape(200, 200) - 0.5
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):  # neighbours do not correlate
        assert abs((a * b).mean() * 12) < 5 / np.sqrt(a.size)
    assert uniform(seeds[7:8], positions[7:8]) == numbers[7]


def test_equal_logits_stay_or_go_together():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    seen = draws(logits, SamplingParams(top_k=2), 3000)
    assert (seen > 0).tolist() == [False, True, True, True, False]


def test_repetition_penalty_counts_prompt_and_output():
    logits = torch.linspace(-2, 2, VOCAB)[None]
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    changed = edited(logits, plan_for([(params, 0)], history=[38, 38, 5]))[0]
    wanted = logits[0].clone()
    for token in (1, 2, 5, 38):
        wanted[token] = wanted[token] / 2 if wanted[token] > 0 else wanted[token] * 2
    assert torch.equal(changed, wanted)


def test_presence_and_frequency_count_output_only():
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    changed = edited(logits, plan_for([(params, 0)], history=[2, 9, 9, 9]))[0]
    assert changed[1] == 0.0  # prompt only
    assert changed[2] == -0.75
    assert changed[9] == -1.25
    assert changed.count_nonzero() == 2
    plain = (SamplingParams(temperature=0), 0)
    both = edited(logits.expand(2, -1), plan_for([plain, (params, 0)], history=[2, 9, 9, 9]))
    assert torch.equal(both, torch.stack([logits[0], changed]))


def test_logit_bias_and_min_tokens():
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=0, logit_bias={7: 4.5, 8: -1}, min_tokens=3)
    early = edited(logits, plan_for([(params, 0)], history=[3, 3]))[0]
    assert (early[7], early[8], early[39]) == (4.5, -1.0, -torch.inf)
    late = edited(logits, plan_for([(params, 0)], history=[3, 3, 3]))[0]
    assert late[39] == 0.0
    assert torch.equal(logits, torch.zeros(1, VOCAB))  # the model's own are left alone


def test_bad_words_of_one_and_several_tokens():
    logits = torch.zeros(1, VOCAB)
    greedy = SamplingParams(temperature=0)
    request = (greedy, 0, (11,), (5, 6, 12), (6, 13), (9, 13), (1, 1, 1, 1, 1, 1, 14))
    changed = edited(logits, plan_for([request], history=[5, 6]))[0]
    assert torch.isinf(changed).nonzero().flatten().tolist() == [11, 12, 13]
    other = edited(logits, plan_for([request], history=[6, 5]))[0]
    assert torch.isinf(other).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1}, {"top_p": 0.5, "top_k": 3}]
)
def test_logits_that_are_not_finite_give_no_token(value, params):
    logits = torch.zeros(2, VOCAB)
    logits[1, 5] = value
    tokens = sample(
        logits, plan_for([(SamplingParams(**params), 0), (SamplingParams(**params), 1)])
    )
    assert tokens[0] >= 0
    assert tokens[1] == -1


def test_nothing_allowed_gives_no_token():
    params = SamplingParams(temperature=0)
    words = [(token,) for token in range(VOCAB)]
    assert sample(torch.zeros(1, VOCAB), plan_for([(params, 0, *words)])).tolist() == [-1]


def test_tiny_temperature_is_greedy(logits):
    for temperature in (1e-4, 1e-30, 1e-60):
        seen = draws(logits, SamplingParams(temperature=temperature), 50)
        assert seen[logits.argmax()] == 1.0


def test_logprobs_and_ranks(logits):
    rows = torch.stack([logits, logits.flip(0)])
    tokens = torch.tensor([int(logits.argmax()), 0])
    best = logprobs(rows, tokens, 3)
    wanted = rows.log_softmax(-1)
    assert torch.allclose(best.chosen, wanted[[0, 1], tokens])
    assert best.ranks.tolist() == [1, int((wanted[1] > wanted[1, 0]).sum()) + 1]
    assert torch.equal(best.top_ids, wanted.topk(3).indices)
    assert logprobs(rows, tokens, 0).top_ids.shape == (2, 0)
    assert logprobs(rows, tokens, 999).top_ids.shape == (2, VOCAB)


def test_no_rows():
    assert sample(torch.zeros(0, VOCAB), GREEDY).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 31), st.integers(1, 30), st.floats(0.05, 0.99))
def test_a_nucleus_of_the_top_k_does_not_depend_on_the_batch_even_with_equal_logits(seed, k, p):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 6, (3, VOCAB), generator=generator).float()
    mine = (SamplingParams(top_k=k, top_p=p), seed)
    alone = sample(logits[1:2], plan_for([mine]))[0]
    for other in (SamplingParams(top_k=VOCAB), SamplingParams(top_p=0.5), SamplingParams(top_k=1)):
        assert sample(logits, plan_for([(other, 1), mine, (other, 2)]))[1] == alone
