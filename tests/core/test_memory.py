"""Too little memory is one error that says what for and what to lower."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cli_helpers import tiny_model  # noqa: F401
from engine_models import CPU, HistoryModel, TinyAttentionModel, make_engine, run
from llmfw.attention.backend import get_attention_backend
from llmfw.engine import kv_cache, model_runner
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.engine.workspace import GRAPH_BYTES, graph_bytes, peak_bytes, sampling_bytes
from llmfw.errors import DeviceError, EngineError
from llmfw.ops.memory import memory_for
from llmfw.phases import Phases
from llmfw.sampling_params import SamplingParams


def out_of_memory(*arguments, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_run_out(error):
    with pytest.raises(DeviceError) as caught:
        with memory_for("the weights", CPU, "lower this", "or that"):
            raise error
    assert caught.value.message == "not enough memory on cpu for the weights"
    assert caught.value.hint == "lower this\nor that"
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 13


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"):
        with memory_for("the weights", CPU):
            raise RuntimeError("shapes differ")


def test_a_real_allocation_that_cannot_be():
    with pytest.raises(DeviceError, match="not enough memory on cpu for a cache"):
        with memory_for("a cache", CPU):
            torch.empty(1 << 60, dtype=torch.uint8)


def test_caches_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(type(get_attention_backend("auto")), "allocate", out_of_memory)
    with pytest.raises(DeviceError, match="for the caches") as caught:
        ModelRunner(TinyAttentionModel(), EngineSettings().on("cpu"), CPU)
    assert "kv_cache_memory" in caught.value.hint


def test_graphs_that_do_not_fit(monkeypatch):
    """The part of a GPU, with a device that only claims to be one."""
    monkeypatch.setattr(model_runner, "GraphRunner", out_of_memory)
    monkeypatch.setattr(ModelRunner, "_capturable", lambda self: True)
    monkeypatch.setattr(ModelRunner, "_reserve", lambda self, wanted: 0)
    monkeypatch.setattr(ModelRunner, "_allocate", lambda self, count: None)
    monkeypatch.setattr(ModelRunner, "table", None, raising=False)
    monkeypatch.setattr(ModelRunner, "caches", None, raising=False)
    monkeypatch.setattr(ModelRunner, "state", SimpleNamespace(layers={}), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    model = TinyAttentionModel()
    model.model_config = type("Config", (), {"ops": None})()
    settings = EngineSettings(kv_cache_memory="1MiB").on("cuda")
    with pytest.raises(DeviceError) as caught:
        ModelRunner(model, settings, torch.device("cuda", 0))
    assert caught.value.message.endswith("for the CUDA graphs: 1.0 of 80.0 GiB are free")
    assert "turn CUDA graphs off" in caught.value.hint


def test_weights_that_do_not_fit(tiny_model, monkeypatch):  # noqa: F811
    from llmfw.models import load, load_model
    from llmfw.plugins import unregister_local

    monkeypatch.setattr(load, "load_dummy", out_of_memory)
    try:
        with pytest.raises(DeviceError, match="for the weights") as caught:
            load_model(
                tiny_model, plugin_modules=[str(tiny_model / "plugin.py")], load_format="dummy"
            )
    finally:
        unregister_local("TinyForCausalLM")
    assert "dtype" in caught.value.hint


def test_caches_get_what_steps_and_graphs_leave(monkeypatch):
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 100_000)
    specs = TinyAttentionModel().cache_specs()
    each = kv_cache.block_bytes(specs, 16)
    settings = EngineSettings(kv_cache_memory=0.5).on("cuda")

    def blocks(**more):
        return kv_cache.count_blocks(specs, settings, 1 << 20, CPU, **more)

    assert blocks() == 50_000 // each
    assert blocks(reserved=40_000) == 30_000 // each
    assert blocks(reserved=40_000, state_bytes=10_000) == 20_000 // each
    with pytest.raises(DeviceError) as caught:
        blocks(reserved=200_000)
    assert "max_num_batched_tokens" in caught.value.hint
    named = EngineSettings(kv_cache_memory=50_000).on("cuda")
    assert kv_cache.count_blocks(specs, named, 1 << 20, CPU, reserved=40_000) == 50_000 // each


def test_what_sampling_takes():
    """All rows' logits and edited copies; of log probabilities 128 rows at a time."""
    assert sampling_bytes(2, 400) == 400 * (2 * 2 + 3 * 2)
    assert sampling_bytes(1000, 400) == 400 * (2 * 1000 + 3 * 128)


def test_what_graphs_keep():
    few = graph_bytes(8_000_000, 8_000, 4, 512, logits_row=100)
    # sizes 1, 2, 4; one limit; prefills of 16, 32, 64, 128, 256 share the room of the longest
    assert few == 8_000_000 * 256 // 8_000 + 100 * 4 + GRAPH_BYTES * (3 + 5)
    assert graph_bytes(8_000_000, 8_000, 256, 512, 100) > few
    assert peak_bytes(lambda: None, CPU) == 0


def test_phases_of_a_runner():
    phases = Phases()
    ModelRunner(HistoryModel(), EngineSettings().on("cpu"), CPU, phases=phases)
    assert list(phases.seconds) == ["cache"]
    with pytest.raises(ValueError), phases.measure("more"):
        raise ValueError
    assert phases.seconds["more"] >= 0


def test_a_step_that_runs_out_stops_the_engine_and_says_what_to_lower():
    model = HistoryModel()
    model.before_step = out_of_memory
    engine = make_engine(model)
    with pytest.raises(EngineError, match="not enough memory on cpu for a step") as caught:
        run(engine, [[1, 2, 3]], SamplingParams(max_tokens=2))
    engine.shutdown()
    assert "max_num_batched_tokens" in caught.value.hint
    assert isinstance(caught.value.__cause__.__cause__, torch.OutOfMemoryError)
