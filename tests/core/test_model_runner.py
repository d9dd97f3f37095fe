from __future__ import annotations

import logging
import pickle

import pytest
import torch

from engine_models import CPU, VOCAB, HistoryModel, StatelessModel, TinyAttentionModel, memory_for
from llmfw.attention.backend import get_attention_backend
from llmfw.attention.metadata import CacheSpec
from llmfw.engine import kv_cache
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import GIB, EngineSettings, parse_memory
from llmfw.engine.step import Chunk, NewRequest, StepInput
from llmfw.errors import ConfigError, DeviceError, UsageError
from llmfw.sampling_params import SamplingParams


def runner(model, **settings) -> ModelRunner:
    settings = {"block_size": 4, "max_num_seqs": 4, **settings}
    return ModelRunner(model, EngineSettings(**settings).on("cpu"), CPU)


def test_cache_is_what_the_sequences_need_at_most():
    model = HistoryModel()
    facts = runner(model).facts()
    assert facts.max_model_len == 256
    assert facts.num_blocks == 4 * 256 // 4
    assert facts.kv_cache_bytes == memory_for(model, facts.num_blocks)
    assert facts.shares_prefixes


def test_cache_is_what_the_memory_holds(caplog):
    model = HistoryModel()
    with caplog.at_level(logging.WARNING):
        facts = runner(model, kv_cache_memory=memory_for(model, 10)).facts()
    assert (facts.num_blocks, facts.max_model_len) == (10, 40)
    assert "max_model_len is 40 instead of the model's 256" in caplog.text


def test_a_length_asked_for_must_fit():
    model = HistoryModel()
    with pytest.raises(DeviceError, match="max_model_len=64, but the KV cache holds 40 tokens"):
        runner(model, kv_cache_memory=memory_for(model, 10), max_model_len=64)
    with pytest.raises(ConfigError, match="max_model_len=300, but the model has 256 positions"):
        runner(model, max_model_len=300)
    with pytest.raises(DeviceError, match="one block of 4 tokens takes 64"):
        runner(model, kv_cache_memory=63)


def test_caches_are_zeroed_in_the_backends_layout():
    made = runner(TinyAttentionModel(), kv_cache_memory="64KiB", max_model_len=32)
    cache = made.caches[1]
    assert cache.k.shape == cache.v.shape
    assert cache.k.shape[0] >= made.num_blocks
    assert cache.k.shape[1:] == (4, 2, 8)
    assert not cache.k.any()
    assert len(cache.tensors) == 2


def test_a_latent_cache_is_one_tensor_and_v_a_view_of_it():
    spec = CacheSpec(1, 12, torch.float32, v_head_dim=8, kind="latent")
    kv_cache.check_specs({0: spec})
    assert spec.bytes_per_token == 12 * 4
    cache = kv_cache.allocate({0: spec}, 3, 4, CPU, get_attention_backend("auto"))[0]
    assert (cache.k.shape, cache.v.shape) == ((3, 4, 1, 12), (3, 4, 1, 8))
    cache.k[2, 1, 0] = torch.arange(12.0)
    assert cache.v[2, 1, 0].tolist() == list(range(8))
    assert [tensor is cache.k for tensor in cache.tensors] == [True]


def test_models_without_cache_and_with_groups():
    assert runner(StatelessModel()).facts().kv_cache_bytes == 0
    assert not runner(StatelessModel()).facts().shares_prefixes
    assert len(kv_cache.group_of_specs(HistoryModel(groups=2).cache_specs())) == 2


def test_state_that_is_not_served_is_refused():
    model = HistoryModel()
    model.cache_specs = lambda: {3: CacheSpec(1, 1, torch.float32, kind="recurrent")}
    with pytest.raises(ConfigError, match="layer 3 keeps 'recurrent' state"):
        runner(model)


def test_warm_up_stays_within_the_models_positions():
    model = HistoryModel()
    made = runner(model, max_num_batched_tokens=1000)
    made._warm_up(256)
    (metadata,) = model.steps
    assert metadata.query_lens == (256, 256, 256)
    assert made.table.row_of == {}


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (None, None),
        (1024, 1024),
        (0.5, 0.5),
        ("1GiB", GIB),
        ("1.5 mb", 3 << 19),
        ("64k", 1 << 16),
        ("100", 100),
    ],
)
def test_amounts_of_memory(value, size):
    assert parse_memory(value) == size


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", "", True, "0", "-1GiB", [1]])
def test_no_amount_of_memory(value):
    with pytest.raises(UsageError, match="no amount of memory"):
        EngineSettings(kv_cache_memory=value)


@pytest.mark.parametrize(
    "setting",
    [{"block_size": 0}, {"block_size": None}, {"max_num_seqs": 0}, {"max_model_len": 1.5},
     {"max_num_batched_tokens": -1}, {"enable_prefix_caching": 1}, {"seed": "x"}],
)  # fmt: skip
def test_settings_out_of_range_name_themselves(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        EngineSettings(**setting)


def test_a_fraction_of_the_free_memory():
    settings = EngineSettings(kv_cache_memory=0.5, max_num_seqs=10**9).on("cpu")
    specs = {0: CacheSpec(1, 1 << 20, torch.float32)}
    blocks = kv_cache.count_blocks(specs, settings, 1 << 20, CPU)
    each = kv_cache.block_bytes(specs, 16)
    assert blocks * each <= kv_cache.free_memory(CPU) * 0.75


def test_steps_and_outputs_travel_as_pickles():
    model = TinyAttentionModel()
    made = runner(model)
    sampling = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1).resolved()
    new = NewRequest(1, (1, 2, 3), sampling)
    step = StepInput(1, (Chunk(1, 0, 3, True, (0,), True),), 0, (new,))
    output = made.launch(pickle.loads(pickle.dumps(step))).read()
    assert pickle.loads(pickle.dumps(output)) == output
    start, entries = output.prompt_logprobs[1]
    assert start == 1
    assert [len(entry.top_ids) for entry in entries] == [1, 1]
    best = output.logprobs[1]
    assert best.rank == 1
    assert best.top_ids[0] == output.token_ids[0] < VOCAB
    assert best.top_logprobs[0] == best.logprob


def test_nothing_waits_for_the_device_before_read(monkeypatch):
    """Until `read`, the host must not look at a value the device makes."""
    made = runner(TinyAttentionModel())
    sampling = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=1).resolved()
    new = NewRequest(1, (1, 2, 3), sampling)
    made.table.apply(StepInput(1, (), 0, (new,)))
    looked = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, name=name: looked.append(name))
    batch = made.builder.build(StepInput(1, (Chunk(1, 0, 3, True, (0,)),), 0))
    with torch.inference_mode():
        pending = made._sample(1, batch, torch.zeros(1, VOCAB))
    assert looked == []
    monkeypatch.undo()
    assert len(pending.read().token_ids) == 1
