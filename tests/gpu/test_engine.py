"""The engine's own device code on a GPU: uploads, token table, sampler, steps in flight."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine_models import CPU, VOCAB, TinyAttentionModel, make_engine, run, tokens_of
from llmfw import LLM
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.request_table import RequestTable
from llmfw.engine.sampler import sample
from llmfw.engine.sampling_plan import plan_sampling
from llmfw.engine.step import NewRequest, StepInput
from llmfw.sampling_params import SamplingParams
from llmfw.weights import load_weights, open_checkpoint, plan_weights
from weight_modules import FakeDecoder, decoder_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = [[(7 * i + j) % VOCAB for j in range(1 + 5 * i % 37)] for i in range(12)]


@pytest.mark.parametrize("settings", [{}, {"pipeline_depth": 1}, {"max_num_batched_tokens": 9}])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"seed": 3, "top_p": 0.9, "top_k": 30}, {"num_beams": 3}]
)
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
    assert torch.equal(drawn[0], drawn[1])


SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"top_p": 0.9, "seed": 1}]
)
def test_launching_a_step_never_waits_for_the_gpu(tmp_path, monkeypatch, cuda_graphs, params):
    """Short and long prompts, decoding and mixed steps: CUDA itself raises where a call waits."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    launch = ModelRunner.launch

    def strict(self, step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    prompts = [[i % 1000 for i in range(length)] for length in (5, 1, 700, 40)]
    sampling = SamplingParams(**params, max_tokens=8, ignore_eos=True)
    settings = {"max_num_seqs": 8, "max_model_len": 1024, "cuda_graphs": cuda_graphs}
    with LLM(
        tmp_path, device="cuda", load_format="dummy", skip_tokenizer_init=True, **settings
    ) as llm:
        llm.generate(prompts, sampling)  # compiles and tunes
        monkeypatch.setattr(ModelRunner, "launch", strict)
        outputs = llm.generate([list(reversed(prompt)) for prompt in prompts], sampling)
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)


def test_graphs_share_the_memory_of_their_logits(tmp_path):
    """They lie upon each other, and tokens are those without graphs."""
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 50_000}))
    prompts = [[(i * j) % 1000 for j in range(3 + i)] for i in range(16)]
    drawn = SamplingParams(
        seed=1, top_k=4, max_tokens=8, ignore_eos=True, return_generation_logits=True
    )
    sampling = [drawn.replace(temperature=0.0) if i % 2 else drawn for i in range(16)]
    found = []
    for cuda_graphs in (True, False):
        with LLM(
            tmp_path, device="cuda", load_format="dummy", skip_tokenizer_init=True, dtype="float32",
            max_num_seqs=64, max_model_len=256, kv_cache_memory="64MiB", cuda_graphs=cuda_graphs,
        ) as llm:  # fmt: skip
            found.append([output.outputs[0] for output in llm.generate(prompts, sampling)])
            graphs = llm._engine._executor.runner.graphs
            if graphs is None:
                continue
            captured = [*graphs._graphs._decode.values(), *graphs._graphs._context.values()]
            logits = [each.output.logits for each in captured]
            assert len(logits) > 10
            assert _bytes_covered(logits) < sum(each.nbytes for each in logits) / 2
    for ours, eager in zip(*found, strict=True):
        assert np.allclose(ours.generation_logits[0], eager.generation_logits[0], atol=1e-4)
        assert ours.token_ids == eager.token_ids


def _bytes_covered(tensors: list[torch.Tensor]) -> int:
    covered = end = 0
    for begin, size in sorted((each.data_ptr(), each.nbytes) for each in tensors):
        covered += max(0, begin + size - max(begin, end))
        end = max(end, begin + size)
    return covered


def test_weights_reach_the_gpu_as_they_are(tmp_path):
    """Through page-locked buffers, several readers, fused and converted."""
    torch.manual_seed(0)
    tensors = decoder_tensors(6)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for dtype in ("declared", torch.bfloat16):
        there, here = FakeDecoder(layers=6), FakeDecoder(layers=6)
        for model, device in ((there, "cuda"), (here, "cpu")):
            plan = plan_weights(model, checkpoint)
            load_weights(model, plan, checkpoint, device=device, dtype=dtype)
        found = dict(there.named_parameters())
        for name, value in here.named_parameters():
            assert torch.equal(found[name].cpu(), value), name
