"""The kernel pack "torch": what it offers where, and its products against the references."""

from __future__ import annotations

import pytest
import torch

from llmfw.kernels import vendor
from llmfw.ops.check import check_kernel
from llmfw.ops.kernel import DeviceInfo, OpContext
from llmfw.ops.table import OpTable

CPU = torch.device("cpu")
SHAPE = {"num_groups": 4, "in_features": 64, "out_features": 32}


def info(*features: str) -> DeviceInfo:
    """A device that says it has these features; its tensors are on the CPU."""
    return DeviceInfo(CPU, frozenset(features))


def test_a_cpu_is_offered_nothing():
    assert vendor.pack.llmfw_kernels(info("cpu", "avx2")) == []


def test_the_grouped_product_is_the_references():
    """torch's grouped product runs on a CPU as well, so it can be checked without a GPU."""
    device = info("cuda", "sm_90")
    (kernel,) = vendor.pack.llmfw_kernels(device)
    report = check_kernel(kernel, device)
    assert report.passed, report.failures
    assert any("multiples of 8" in reason for _, reason in report.declined)


@pytest.mark.parametrize(
    ("features", "dtype", "chosen"),
    [
        (("cuda", "sm_90"), torch.bfloat16, "torch.grouped_linear"),
        (("cuda", "sm_90", "sm_100"), torch.bfloat16, "torch.grouped_linear"),
        (("cuda", "sm_90"), torch.float32, "reference"),
        (("cuda", "sm_80"), torch.bfloat16, "reference"),
        (("cuda", "sm_90", "sm_120"), torch.bfloat16, "reference"),
        (("cuda",), torch.bfloat16, "reference"),
    ],
)
def test_it_serves_where_torch_waits_for_nothing(features: tuple[str, ...], dtype, chosen: str):
    device = info(*features)
    table = OpTable(device, tuple(vendor.pack.llmfw_kernels(device)))
    table.resolve("grouped_linear", dtype, **SHAPE)
    (choice,) = table.choices.values()
    assert choice.chosen == chosen


def test_an_old_torch_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vendor, "grouped_product", lambda info: None)
    device = info("cuda", "sm_90")
    (kernel,) = vendor.pack.llmfw_kernels(device)
    refusal = kernel.refusal(OpContext("grouped_linear", torch.bfloat16, device, SHAPE))
    assert refusal == "torch has no grouped product for this device"
