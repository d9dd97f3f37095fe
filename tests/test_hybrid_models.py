"""A made-up hybrid: a stock decoder some of whose layers keep state, beside attention or alone."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from engine_models import CPU, run, tokens_of
from llmfw import (
    Attention,
    AttentionMetadata,
    Layer,
    ModelConfig,
    StateSpec,
    StateTensor,
    build,
    hookimpl,
)
from llmfw.attention.state import StateCache, slot_bytes
from llmfw.engine.engine import LLMEngine
from llmfw.engine.executor import InProcessExecutor
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.models import StockDecoderForCausalLM
from llmfw.models.build import CoreDefaults
from llmfw.models.weights import load_dummy
from llmfw.plugins import PluginHost
from llmfw.sampling_params import SamplingParams
from llmfw.testing import PackedSession
from parity import random_prompts
from recurrent_batches import SLOTS, batch

VOCAB, HIDDEN, COUNT = 97, 32, 10
BLOCK = 4


class Fading(Layer):
    """A sum over a request's tokens, of which half is forgotten at each; projected."""

    def __init__(self, config: ModelConfig[Any], layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.proj = config.make(
            "linear",
            "proj",
            layer_idx=layer_idx,
            in_features=HIDDEN,
            out_features=HIDDEN,
            bias=False,
        )

    def state_spec(self) -> StateSpec:
        return StateSpec({"sum": StateTensor((HIDDEN,), torch.float32)})

    def forward(
        self,
        position_ids: torch.Tensor,
        x: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **_: Any,
    ) -> torch.Tensor:
        sums = attn_metadata.states[self.layer_idx]["sum"]
        rows = []
        parts = x.split(attn_metadata.query_lens)
        for slot, part in zip(attn_metadata.state_slots.tolist(), parts, strict=True):
            for token in part:
                sums[slot] = sums[slot] / 2 + token
                rows.append(sums[slot].clone())
        return self.proj(torch.stack(rows))


class Both(nn.Module):
    """Attention and a fading sum side by side, under one layer index."""

    def __init__(self, attention: Attention, fading: Fading) -> None:
        super().__init__()
        self.attention, self.fading = attention, fading

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.attention(*args, **kwargs) + self.fading(*args, **kwargs)


class Hybrid:
    """Layers of three kinds: attention, a fading sum, both."""

    @hookimpl
    def llmfw_layer(self, kind, role, model_config, layer_idx, spec):
        if kind != "attention" or layer_idx == 0:
            return None
        fading = Fading(model_config, layer_idx)
        if layer_idx == 1:
            return fading
        return Both(Attention(config=model_config, layer_idx=layer_idx, **spec), fading)


@pytest.fixture(scope="module")
def model() -> StockDecoderForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    host = PluginHost(Hybrid(), name="hybrid", defaults=CoreDefaults())
    model = build(ModelConfig(pretrained_config=config, max_model_len=128, block_size=BLOCK), host)
    load_dummy(model, std=0.3)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompts(1, VOCAB, n, n, seed=n)[0] for n in (18, 1, 17, 27, 16)]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    """Greedy tokens of each prompt, computed as a whole again for every token."""
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(COUNT):
            logits = PackedSession(model).step({"a": tokens})["a"]
            tokens.append(int(logits[-1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def test_each_kind_of_state_is_declared_apart(model):
    assert sorted(model.cache_specs()) == [0, 2]
    assert sorted(model.state_specs()) == [1, 2]


def test_pieces_give_the_logits_of_the_whole(model, prompts):
    ids = max(prompts, key=len)
    whole = PackedSession(model).step({"a": ids})["a"]
    session = PackedSession(model)
    pieces = [ids[:5], ids[5:6], ids[6:20], *[[token] for token in ids[20:]]]
    got = torch.cat([session.step({"b": [1, 2], "a": piece})["a"] for piece in pieces])
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 2, "pipeline_depth": 1},
        {"max_num_batched_tokens": 7},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
        {"memory": 14},
    ],
    ids=["all at once", "slots reused", "chunks", "whole prompts", "preempted"],
)
def test_the_engine_gives_the_tokens_of_whole_prompts(model, prompts, expected, settings):
    settings = {"block_size": BLOCK, "max_num_seqs": 8, **settings}
    blocks = settings.pop("memory", None)
    if blocks is not None:
        per_block = BLOCK * sum(spec.bytes_per_token for spec in model.cache_specs().values())
        settings["kv_cache_memory"] = 9 * slot_bytes(model.state_specs()) + blocks * per_block
        settings["max_model_len"] = 40
    settled = EngineSettings(**settings).on("cpu")
    runner = ModelRunner(model, settled, CPU, max_model_len=settings.get("max_model_len", 128))
    engine = LLMEngine(InProcessExecutor(runner), settled, vocab_size=VOCAB)
    greedy = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    for _ in range(2):  # the second time nothing comes from a prefix cache
        assert tokens_of(run(engine, prompts, greedy)) == expected
    stats = engine.stats()
    engine.shutdown()
    assert stats.prefix_hits == 0
    assert bool(stats.preemptions) == (blocks is not None)


def test_the_guides_layer_gives_means_in_any_batch():
    """The example of docs/plugins/layers.md, over slots that requests use in turns."""
    page = (Path(__file__).parent.parent / "docs/plugins/layers.md").read_text("utf-8")
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "Mean" in code)
    names: dict[str, Any] = {}
    exec(compile(block, "layers.md", "exec"), names)
    layer = names["RunningMean"](3, 5)
    cache = StateCache({5: layer.state_spec()}, SLOTS, CPU)
    metadata = batch("mixed")
    first, second = (torch.randn(sum(metadata.query_lens), 3) for _ in range(2))
    starts = torch.cat([torch.arange(n) for n in metadata.query_lens])
    begun = torch.repeat_interleave(
        torch.tensor(metadata.query_lens), torch.tensor(metadata.query_lens)
    )
    metadata = replace(metadata, states=cache.layers)
    layer(first, replace(metadata, positions=starts))
    got = layer(second, replace(metadata, positions=starts + begun))
    for mean, one, two in zip(
        *(part.split(metadata.query_lens) for part in (got, first, second)), strict=True
    ):
        torch.testing.assert_close(mean[-1], torch.cat((one, two)).mean(0))


def test_steps_whose_state_needs_the_host_are_not_captured(model, caplog: pytest.LogCaptureFixture):
    runner = ModelRunner(model, EngineSettings(block_size=BLOCK).on("cpu"), CPU)
    with caplog.at_level(logging.INFO, logger="llmfw.engine"):
        assert not runner._capturable()
    assert "no CUDA graphs: a recurrent layer does not read the batch on the device" in caplog.text
