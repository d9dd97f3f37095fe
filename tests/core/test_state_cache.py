"""Recurrent state: slots, their memory, and engines whose models keep it instead of K and V."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from engine_models import CPU, HistoryModel, RecurrentModel, make_engine, run, tokens_of
from llmfw.attention.state import StateCache, StateSpec, StateTensor, slot_bytes
from llmfw.config import ModelConfig
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.errors import ConfigError, DeviceError
from llmfw.models import PretrainedModel
from llmfw.request import Request
from llmfw.sampling_params import SamplingParams

SPECS = {
    2: StateSpec({"a": StateTensor((3, 5), torch.bfloat16), "b": StateTensor((2,), torch.float32)}),
    5: StateSpec({"a": StateTensor((), torch.int64)}),
}
PROMPTS = [[(7 * i + j) % 97 for j in range(n)] for i, n in enumerate((1, 30, 2, 17, 9, 33, 1, 5))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def expected(model: RecurrentModel, count: int = 12) -> list[list[int]]:
    return [model.expected(prompt, count) for prompt in PROMPTS]


def test_slots_hold_their_tensors_apart():
    cache = StateCache(SPECS, 4, CPU)
    assert slot_bytes(SPECS) == 3 * 64
    tensors = [tensor for layer in cache.layers.values() for tensor in layer.values()]
    assert [tuple(t.shape) for t in tensors] == [(4, 3, 5), (4, 2), (4,)]
    assert [t.dtype for t in tensors] == [torch.bfloat16, torch.float32, torch.int64]
    assert all(t.data_ptr() % 64 == 0 and t[1].data_ptr() % 64 == 0 for t in tensors)
    for number, tensor in enumerate(tensors, 1):
        tensor.fill_(number)
    cache.clear(torch.tensor([1, 3]))
    for number, tensor in enumerate(tensors, 1):
        assert tensor[[0, 2]].eq(number).all()
        assert not tensor[[1, 3]].any()


@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("budget", [5, 2048])
@pytest.mark.parametrize("depth", [0, 1])
def test_state_is_carried_through_chunks_batches_and_slots(groups: int, budget: int, depth: int):
    """More requests than slots: each slot serves several, in batches that mix chunks and decode."""
    model = RecurrentModel(groups=groups)
    engine = make_engine(model, max_num_seqs=3, max_num_batched_tokens=budget, pipeline_depth=depth)
    outputs = run(engine, PROMPTS, GREEDY)
    assert tokens_of(outputs) == expected(model)
    assert engine.stats().prefix_queries == 0 or engine.stats().prefix_hits == 0
    engine.shutdown()


def test_a_preempted_hybrid_starts_again_from_nothing():
    model = RecurrentModel(groups=1)
    memory = 2 * 9 * slot_bytes(model.state_specs())  # half of it for 8 sequences and a spare one
    engine = make_engine(model, kv_cache_memory=memory, max_model_len=48)
    outputs = run(engine, PROMPTS[1:6], GREEDY)
    assert tokens_of(outputs) == expected(model)[1:6]
    assert engine.stats().preemptions > 0
    engine.shutdown()


def test_aborted_requests_leave_their_slots():
    model = RecurrentModel()
    engine = make_engine(model, max_num_seqs=1)
    endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    first = engine.add_request(Request("a", (1, 2, 3), endless), streaming=True)
    next(iter(first))
    engine.abort("a")
    assert first.result(timeout=60).outputs[0].finish_reason == "abort"
    (output,) = run(engine, [PROMPTS[3]], GREEDY)
    assert output.outputs[0].token_ids == model.expected(PROMPTS[3], 12)
    engine.shutdown()


def test_a_model_without_attention_takes_no_blocks():
    model = RecurrentModel()
    engine = make_engine(model)
    facts = engine.facts
    assert (facts.num_blocks, facts.kv_cache_bytes, facts.shares_prefixes) == (0, 0, False)
    assert facts.state_bytes == 9 * slot_bytes(model.state_specs())
    outputs = run(engine, PROMPTS, GREEDY)
    assert tokens_of(outputs) == expected(model)
    stats = engine.stats()
    assert (stats.kv_blocks, stats.kv_blocks_used, stats.kv_usage) == (0, 0, 0.0)
    engine.shutdown()


def runner(model: nn.Module, **settings: object) -> ModelRunner:
    settings = {"block_size": 4, "max_num_seqs": 8, **settings}
    return ModelRunner(model, EngineSettings(**settings).on("cpu"), CPU)


def test_the_memory_limits_the_sequences(caplog: pytest.LogCaptureFixture):
    model = RecurrentModel(width=1000)
    each = slot_bytes(model.state_specs())
    assert runner(model, kv_cache_memory=9 * each).max_num_seqs == 8
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        facts = runner(model, kv_cache_memory=4 * each).facts()
    assert "max_num_seqs is 3 instead of 8" in caplog.text
    assert (facts.max_num_seqs, facts.state_bytes) == (3, 4 * each)
    with pytest.raises(DeviceError, match="recurrent state has"):
        runner(model, kv_cache_memory=2 * each - 1)


def test_a_hybrid_shares_its_memory():
    model = RecurrentModel(groups=1, width=1000)
    each = slot_bytes(model.state_specs())
    facts = runner(model, kv_cache_memory=8 * each).facts()
    assert facts.max_num_seqs == 3
    assert facts.state_bytes + facts.kv_cache_bytes <= 8 * each
    assert facts.num_blocks == 3 * 256 // 4
    assert not facts.shares_prefixes


def test_the_warm_up_has_slots():
    model = RecurrentModel(groups=1)
    runner(model)._warm_up(16)
    (metadata,) = model.steps
    assert metadata.state_slots.tolist() == list(range(8))


class Recurrent(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def state_spec(self) -> StateSpec:
        return SPECS[2]


def test_two_modules_of_one_layer_may_not_share_its_state():
    model = PretrainedModel(ModelConfig(pretrained_config=None))
    model.first, model.second = Recurrent(0), Recurrent(1)
    assert model.state_specs() == {0: SPECS[2], 1: SPECS[2]}
    model.second.layer_idx = 0
    with pytest.raises(ConfigError, match="second keeps state as layer 0, as another module does"):
        model.state_specs()


@pytest.mark.parametrize("groups", [0, 1])
def test_beams_and_completions_carry_states_of_their_own(groups: int):
    """What a model with K and V answers, whose next token follows from the same history."""
    wanted = [
        SamplingParams(temperature=0, max_tokens=6, num_beams=3, n=2, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=6, ignore_eos=True),
    ]
    answers = []
    for model in (HistoryModel(), RecurrentModel(groups=groups)):
        engine = make_engine(model)
        outputs = run(engine, PROMPTS[2:6], wanted * 2)
        answers.append([[each.token_ids for each in output.outputs] for output in outputs])
        engine.shutdown()
    assert answers[0] == answers[1]
