"""Replayed steps in an engine, with graphs played by the steps that they would capture."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_models import CPU, VOCAB, HistoryModel, make_engine, memory_for, run, tokens_of
from llmfw.engine.cuda_graphs import StepGraphs
from llmfw.engine.engine import LLMEngine
from llmfw.engine.executor import InProcessExecutor
from llmfw.engine.graph_runner import GraphRunner, longest_first
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.ops import DeviceInfo, OpTable
from llmfw.request import Request
from llmfw.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


class Played:
    """A graph's place: replaying it computes the step, and spoils the logits of the one before."""

    replays = 0
    logits = torch.empty(0)

    def __init__(self, step):
        self.step = step

    def replay(self):
        Played.logits.fill_(float("nan"))
        Played.replays += 1
        output = self.step.compute()
        Played.logits = output.logits
        return output


def as_on_a_host(model):
    """The test model reads lengths on the host; a captured step knows the device's alone."""

    def forward(metadata, input_ids, positions):
        count = int(metadata.cu_query_lens[-1])
        lens = tuple(metadata.cu_query_lens.diff().tolist())
        view = metadata.groups[0]
        exact = replace(
            metadata,
            query_lens=lens,
            kv_lens=tuple(metadata.kv_lens_device.tolist()),
            num_contexts=sum(n > 1 for n in lens),
            positions=positions[:count],
            groups=(replace(view, slots=view.slots[:count]),),
        )
        return model(exact, input_ids[:count], positions[:count])

    return forward


@pytest.fixture
def replaying(monkeypatch):
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, step: Played(step))
    made = []

    def make(model, **settings):
        settled = EngineSettings(
            block_size=4, max_num_seqs=8, pipeline_depth=1, enable_prefix_caching=False, **settings
        ).on("cpu")
        runner = ModelRunner(model, settled, CPU)
        config = SimpleNamespace(ops=OpTable(DeviceInfo(CPU, frozenset())), dtype=torch.float32)
        runner.graphs = GraphRunner(
            as_on_a_host(model),
            config,
            runner.table,
            runner.caches,
            1,
            runner.num_blocks,
            runner.state.layers,
        )
        made.append(LLMEngine(InProcessExecutor(runner), settled, vocab_size=VOCAB))
        Played.replays = 0
        return made[-1]

    yield make
    for engine in made:
        engine.shutdown()


def drawn(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Prompts and how many tokens follow."""
    rng = random.Random(seed)
    lengths = [rng.choice((1, rng.randint(2, 40))) for _ in range(count)]
    return [([rng.randrange(VOCAB) for _ in range(n)], rng.randint(1, 25)) for n in lengths]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 24}, {"blocks": 24, "max_model_len": 80}],
    ids=["plain", "chunked", "preempted"],
)
def test_replayed_tokens_are_exact(replaying, settings):
    model = HistoryModel()
    settings = dict(settings)
    blocks = settings.pop("blocks", 200)
    engine = replaying(model, kv_cache_memory=memory_for(model, blocks), **settings)
    wanted = drawn(40, seed=len(settings))
    params = [GREEDY.replace(max_tokens=count, ignore_eos=True) for _, count in wanted]
    outputs = run(engine, [prompt for prompt, _ in wanted], params)
    for tokens, (prompt, count) in zip(tokens_of(outputs), wanted, strict=True):
        assert tokens == model.expected(prompt, count)
    stats = engine.stats()
    assert Played.replays > stats.steps // 3
    assert (stats.preemptions > 0) == (blocks == 24)


def test_requests_come_and_go_between_replays(replaying):
    """One after the other, several at once, aborted: positions are those of whoever is there."""
    model = HistoryModel()
    engine = replaying(model)
    wanted = drawn(30, seed=5)
    for first in range(0, 30, 3):
        group = wanted[first : first + 3]
        handles = [
            engine.add_request(
                Request(engine.new_request_id(), tuple(prompt), GREEDY.replace(max_tokens=count))
            )
            for prompt, count in group
        ]
        if first % 2:
            handles[0].abort()
        for handle, (prompt, count) in zip(handles, group, strict=True):
            tokens = handle.result(timeout=60).outputs[0].token_ids
            assert tokens == model.expected(prompt, count)[: len(tokens)]
            assert first % 2 or len(tokens) == count


@pytest.mark.parametrize(
    "fields", [{"seed": 3, "top_k": 30}, {"num_beams": 3}, {"temperature": 0, "logprobs": 2}]
)
def test_draws_beams_and_logprobs_are_those_of_eager_steps(replaying, fields):
    params = SamplingParams(**fields, max_tokens=12)
    prompts = [prompt for prompt, _ in drawn(12, seed=7)]
    found = []
    for make in (replaying, make_engine):
        engine = make(HistoryModel())
        outputs = run(engine, prompts, params)
        found.append([(c.token_ids, c.logprobs) for output in outputs for c in output.outputs])
        engine.shutdown()
    assert Played.replays > 5
    assert found[0] == found[1]


def test_kept_logits_outlast_the_next_replay(replaying):
    model = HistoryModel()
    params = GREEDY.replace(max_tokens=8, return_generation_logits=True)
    for output in run(replaying(model), [[1, 2, 3], [4], [5, 6]], params):
        completion = output.outputs[0]
        assert completion.generation_logits.argmax(-1).tolist() == completion.token_ids


def test_the_longest_come_first_and_keep_their_rows():
    given = (7, 8, 9, 10), np.array([3, 0, 2, 1]), np.array([4, 9, 4, 5])
    ids, rows, positions = longest_first(*given)
    assert ids == (8, 10, 7, 9)
    assert rows.tolist() == [0, 1, 3, 2]
    assert positions.tolist() == [9, 5, 4, 4]
    assert longest_first(ids, rows, positions) == (ids, rows, positions)
    many = tuple(range(200)), np.arange(200), np.arange(200)
    assert longest_first(*many) == many
