"""Loading: dtypes, threads, progress, what happens after, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llmfw.errors import UsageError, WeightError
from llmfw.weights import (
    LoadReport,
    MemoryCheckpoint,
    load_into,
    load_weights,
    open_checkpoint,
    plan_weights,
)
from llmfw.weights.loader import LoadDtype
from weight_modules import FakeDecoder, FakeLinear, decoder_tensors, meta_parameter, module_of


def load_as(tensor: torch.Tensor, declared: torch.dtype, dtype: LoadDtype) -> torch.dtype:
    module = nn.Module()
    module.register_parameter("w", meta_parameter(*tensor.shape, dtype=declared))
    checkpoint = MemoryCheckpoint({"w": tensor})
    load_weights(module, plan_weights(module, checkpoint), checkpoint, dtype=dtype)
    assert torch.equal(module.w, tensor.to(module.w.dtype))
    return module.w.dtype


def test_dtype_is_converted_only_as_asked() -> None:
    stored, declared = torch.randn(3).bfloat16(), torch.float32
    assert load_as(stored, declared, "declared") == torch.float32
    assert load_as(stored, declared, "stored") == torch.bfloat16
    assert load_as(stored, declared, torch.float16) == torch.float16
    assert load_as(torch.ones(3, dtype=torch.int8), torch.int8, torch.float16) == torch.int8


def test_parts_of_different_dtypes_are_stored_as_the_wider() -> None:
    tensors = decoder_tensors(1)
    tensors["layers.0.q_proj.weight"] = tensors["layers.0.q_proj.weight"].bfloat16()
    model, checkpoint = FakeDecoder(layers=1), MemoryCheckpoint(tensors)
    load_weights(model, plan_weights(model, checkpoint), checkpoint, dtype="stored")
    assert model.layers[0].qkv_proj.weight.dtype == torch.float32


def test_threads_progress_and_report(tmp_path: Path) -> None:
    tensors = decoder_tensors(6)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    reports: list[LoadReport] = []
    for threads in (1, 4):
        model = FakeDecoder(layers=6)
        seen: list[tuple[int, int, str]] = []
        plan = plan_weights(model, checkpoint)
        report = load_weights(
            model,
            plan,
            checkpoint,
            threads=threads,
            progress=lambda *step, seen=seen: seen.append(step),
        )
        reports.append(report)
        assert torch.equal(model.layers[3].o_proj.weight, tensors["layers.3.o_proj.weight"])
        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert seen[-1][0] == seen[-1][1] == report.nbytes
        assert {name for _, _, name in seen} == {name for name, _ in model.named_parameters()}
    one, four = reports
    assert (one.parameters, one.nbytes, one.dtypes) == (four.parameters, four.nbytes, four.dtypes)
    assert one.dtypes == {"float32": one.nbytes}
    with pytest.raises(UsageError, match="threads=0"):
        load_weights(FakeDecoder(), plan, checkpoint, threads=0)


def test_post_load_runs_once_a_module_after_all_values_are_there() -> None:
    class Prepared(FakeLinear):
        calls = 0

        def post_load(self) -> None:
            assert not self.weight.is_meta
            Prepared.calls += 1

    module = nn.Module()
    module.a, module.b = Prepared(2, 2), Prepared(2, 2)
    module.b.weight = module.a.weight
    load_into(module, {"a.weight": torch.ones(2, 2)})
    assert Prepared.calls == 2
    assert module.b.weight is module.a.weight


def test_a_buffer_left_on_meta_is_an_error() -> None:
    module = module_of({"w": torch.zeros(2)})
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(WeightError, match="still without values after loading: table"):
        load_into(module, {"w": torch.zeros(2)})


def test_parameters_keep_their_attributes_and_need_no_gradient() -> None:
    module = module_of({"w": torch.zeros(2)})
    module.w.note = "kept"
    load_into(module, {"w": torch.ones(2)})
    assert module.w.note == "kept"
    assert not module.w.requires_grad


def test_load_into_a_part_by_prefix_leaves_the_rest_alone() -> None:
    model, tensors = FakeDecoder(), decoder_tensors()
    load_into(model.layers[1], tensors, prefix="layers.1.")
    assert torch.equal(model.layers[1].o_proj.weight, tensors["layers.1.o_proj.weight"])
    assert model.layers[0].o_proj.weight.is_meta


def test_values_given_are_copied() -> None:
    module, value = module_of({"w": torch.zeros(2)}), torch.ones(2)
    load_into(module, {"w": value})
    value.zero_()
    assert torch.equal(module.w, torch.ones(2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "size"), [("float32", 25 << 23), ("bfloat16", 25 << 22)])
def test_peak_memory_is_the_model_and_two_tensors(dtype: str, size: int) -> None:
    """200 MB in tensors of 8 MB, as they are and converted; mapped pages of the file count."""
    script = Path(__file__).parent.parent / "measure_load_memory.py"
    command = [sys.executable, str(script), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["model_bytes"] == size
    allowed = size + 2 * figures["largest_tensor_bytes"]
    assert figures["peak_bytes"] <= allowed + (4 << 20)  # Python's own
