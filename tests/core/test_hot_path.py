"""Starting a step waits for nothing on the device: no value is read back before `read`.

Where there is no GPU, the calls that would wait on one are counted: values read by the dispatcher
(`.item()`, `if tensor:`, sizes that depend on values) and copies to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine_models import VOCAB, make_engine, run, tokens_of
from llmfw.attention.metadata import CacheSpec
from llmfw.engine.model_runner import ModelRunner
from llmfw.sampling_params import SamplingParams

WAITING = {
    "aten::_local_scalar_dense",  # item, int(), bool(), if
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
TO_HOST = ("tolist", "item", "cpu")  # numpy() cannot be called on a GPU at all


class Watch(TorchDispatchMode):
    """Notes the operations that would wait for a GPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(found: list[str]) -> Iterator[None]:
    """Note operations and methods that read values back."""
    kept = {name: getattr(torch.Tensor, name) for name in TO_HOST}

    def noted(name):
        def method(self, *arguments, **more):
            found.append(f"Tensor.{name}")
            return kept[name](self, *arguments, **more)

        return method

    try:
        for name in TO_HOST:
            setattr(torch.Tensor, name, noted(name))
        with Watch(found):
            yield
    finally:
        for name, method in kept.items():
            setattr(torch.Tensor, name, method)


class PlainModel(nn.Module):
    """Has a cache that it does not read, and logits that follow from token and position."""

    max_positions: int | None = 256
    vocab_size = VOCAB

    def cache_specs(self) -> dict[int, CacheSpec]:
        return {0: CacheSpec(1, 4, torch.float32)}

    def state_specs(self) -> dict:
        return {}

    def forward(self, attn_metadata, input_ids, position_ids):
        wanted = attn_metadata.logits_indices
        last = input_ids * 3 + position_ids
        best = (last if wanted is None else last[wanted]) % VOCAB
        places = torch.arange(VOCAB, dtype=torch.float32)
        return -(places - best[:, None]).abs()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "top_k": 5, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "seed": 1},
        {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 0, "logprobs": 2},
    ],
    ids=lambda params: " ".join(params),
)
def test_launching_a_step_reads_nothing_back(params, monkeypatch) -> None:
    found: list[str] = []
    launched = []
    launch = ModelRunner.launch

    def watching(self, step):
        launched.append((len(step.chunks), step.num_generations))
        with watched(found):
            return launch(self, step)

    prompts = [[i % VOCAB for i in range(length)] for length in (5, 1, 17)]
    sampling = SamplingParams(**params, max_tokens=6, ignore_eos=True)
    settings = {"pipeline_depth": 1, "max_num_batched_tokens": 8}
    engine = make_engine(PlainModel(), **settings)
    expected = tokens_of(run(engine, prompts, sampling))
    engine.shutdown()
    monkeypatch.setattr(ModelRunner, "launch", watching)
    engine = make_engine(PlainModel(), **settings)
    assert tokens_of(run(engine, prompts, sampling)) == expected
    engine.shutdown()
    assert any(generations == count == 3 for count, generations in launched)
    assert any(generations < count for count, generations in launched), "prompts were read"
    assert found == []


def test_the_watch_sees_what_waits() -> None:
    found: list[str] = []
    x = torch.arange(3.0)
    with watched(found):
        x.sum().item()
        bool(x[0] == 0)
        x.nonzero()
        x.tolist()
    assert "Tensor.item" in found
    assert "Tensor.tolist" in found
    assert {"aten::_local_scalar_dense", "aten::nonzero"} <= set(found)
