"""Memory, kernels and graphs on a GPU that is not there: sums that can be made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfw.engine.cuda_graphs import batch_sizes
from llmfw.engine.estimate import CONTEXT_BYTES, estimate, graph_plan
from llmfw.engine.gpus import GPUS, gpu_named
from llmfw.engine.settings import EngineSettings
from llmfw.errors import UsageError

HIDDEN, INNER, LAYERS, VOCAB, HEADS, KV_HEADS, HEAD = 64, 128, 3, 256, 4, 2, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
IN_LAYER = HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD + HEADS * HEAD * HIDDEN + 3 * HIDDEN * INNER
NUMBERS = 2 * VOCAB * HIDDEN + LAYERS * (IN_LAYER + 2 * HIDDEN) + HIDDEN


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_weights_and_cache_by_hand(model: Path) -> None:
    told = estimate(model, gpu_named("t4"), settings=EngineSettings(max_num_seqs=8))
    assert told.weights == NUMBERS * 2
    assert told.kv_bytes_per_token == LAYERS * 2 * KV_HEADS * HEAD * 2
    assert (told.kv_tokens, told.full_sequences) == (8 * 4096, 8.0)  # all that can be needed
    assert told.kv_cache == told.kv_tokens * told.kv_bytes_per_token
    assert told.fits
    table = VOCAB * HIDDEN  # of embeddings: one row of it is read
    assert told.tokens_per_second == round(320e9 / ((NUMBERS - table) * 2), 1)


def test_the_cache_gets_what_is_left(model: Path) -> None:
    gpu = gpu_named("t4")
    told = estimate(model, gpu, settings=EngineSettings(max_num_seqs=100_000))
    left = gpu.memory - CONTEXT_BYTES - told.weights - told.activations
    assert told.kv_cache <= left * 0.9 < told.kv_cache + 16 * told.kv_bytes_per_token
    half = estimate(model, gpu, settings=EngineSettings(max_num_seqs=100_000, kv_cache_memory=0.45))
    assert half.kv_tokens == pytest.approx(told.kv_tokens / 2, abs=16)
    small = estimate(model, gpu, settings=EngineSettings(kv_cache_memory=1 << 20))
    assert small.kv_cache <= 1 << 20
    assert not small.fits


def test_another_dtype_takes_other_memory(model: Path) -> None:
    gpu = gpu_named("h100")
    assert estimate(model, gpu, dtype="float32").weights == NUMBERS * 4


def test_kernels_are_those_that_the_gpu_would_have(model: Path) -> None:
    def chosen(gpu: str, **more: str) -> dict[str, str]:
        found = estimate(model, gpu_named(gpu), **more).kernels
        return {each.op: each.kernel for each in found}

    assert chosen("h100")["paged_attention"] == "cupy.paged_attention"  # heads of 16
    assert chosen("h100")["linear"] == "cupy.linear"
    assert chosen("t4")["paged_attention"] == "reference"  # its capability is 7.5
    assert set(chosen("h100", kernels="reference").values()) == {"reference"}
    (attention,) = [
        each for each in estimate(model, gpu_named("t4")).kernels if each.op == "paged_attention"
    ]
    assert any("needs sm_80" in reason for reason in attention.reasons)


def test_there_are_no_graphs_where_a_start_would_capture_none(model: Path) -> None:
    two = estimate(model, gpu_named("h100"), settings=EngineSettings(max_num_seqs=2))
    assert (two.no_graphs, two.graphs.batch_sizes) == (None, (1, 2))
    told = estimate(model, gpu_named("t4"))
    assert told.no_graphs in {
        f"{op} runs by its reference" for op in ("rope_and_cache", "paged_attention")
    }
    assert (told.graphs.count, told.graphs.batch_sizes) == (0, ())


def test_parts_that_another_kernel_makes_needless_are_not_asked_for(tmp_path: Path) -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    moe = {**CONFIG, **experts, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(moe))
    told = estimate(tmp_path, gpu_named("a100-80gb"))
    kernels = {each.op: each.kernel for each in told.kernels}
    assert kernels["moe_experts"] == "cupy.moe_experts"
    assert "grouped_linear" not in kernels
    assert told.graphs.count > 0
    told = estimate(tmp_path, gpu_named("a100-80gb"), kernels="-cupy.moe_experts")
    assert told.no_graphs == "grouped_linear runs by its reference"


def test_graphs_are_those_that_a_start_captures() -> None:
    plan = graph_plan(8, 2000)
    assert plan.batch_sizes == tuple(batch_sizes(8))
    assert plan.kv_limits == (1024, 2000)
    assert plan.prompt_lengths == (16, 32, 64, 128, 256, 512)
    assert plan.count == len(plan.batch_sizes) * 2 + 6


def test_gpus_by_name() -> None:
    assert gpu_named("H100") is GPUS["h100"]
    assert gpu_named("A100_80GB") is GPUS["a100-80gb"]
    with pytest.raises(UsageError, match="'h10' is not in the table") as caught:
        gpu_named("h10")
    assert "h100" in str(caught.value.hint)
    assert all(gpu.memory >= 16 << 30 and gpu.capability >= (7, 0) for gpu in GPUS.values())
