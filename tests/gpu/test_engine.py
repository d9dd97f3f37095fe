"""The engine's own device code on a GPU: uploads, token table, sampler, steps in flight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_models import CPU, VOCAB, TinyAttentionModel, make_engine, run, tokens_of
from llmfw.engine.request_table import RequestTable
from llmfw.engine.sampler import sample
from llmfw.engine.sampling_plan import plan_sampling
from llmfw.engine.step import NewRequest, StepInput
from llmfw.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = [[(7 * i + j) % VOCAB for j in range(1 + 5 * i % 37)] for i in range(12)]


@pytest.mark.parametrize("settings", [{}, {"pipeline_depth": 1}, {"max_num_batched_tokens": 9}])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3, "top_p": 0.9, "top_k": 30}])
def test_tokens_are_those_of_the_cpu(settings, params):
    sampling = SamplingParams(**params, max_tokens=24)
    device = torch.device("cuda", 0)
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for where in (CPU, device):
        model = TinyAttentionModel(device=where)
        engine = make_engine(model, device=where, kv_cache_memory="1MiB", **settings)
        found.append(tokens_of(run(engine, PROMPTS, sampling)))
        engine.shutdown()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1, "top_p": 0.9, "top_k": 20, "temperature": 1.4},
        {
            "temperature": 1.0,
            "repetition_penalty": 1.4,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
        },
        {"logit_bias": {3: 4.0}, "min_tokens": 5, "temperature": 0},
    ],
)
def test_draws_are_those_of_the_cpu(params):
    rows = 64
    logits = torch.randn(rows, 1000, generator=torch.Generator().manual_seed(0)) * 3
    drawn = []
    for device in (CPU, torch.device("cuda", 0)):
        table = RequestTable(rows, 64, 4, device)
        sampling = SamplingParams(**params).resolved()
        words = ((5,), (1, 6))
        new = tuple(NewRequest(i, (1, 2, i), sampling, i, (9,), words) for i in range(rows))
        table.apply(StepInput(1, (), 0, new))
        order = np.array([table.row_of[i] for i in range(rows)])
        plan = plan_sampling(table, order, np.full(rows, 3))
        drawn.append(sample(logits.to(device), plan).cpu())
    assert (drawn[0] != drawn[1]).sum() <= 1  # a draw may lie on a border within rounding
