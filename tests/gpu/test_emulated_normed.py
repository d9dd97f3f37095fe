"""Products that share an RMS norm on the CPU emulator: every variant, clusters, several tiles."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.emulated import emulator
from gpu.kernel_cases import FEATURES, Case, check, kernel_of
from gpu.normed_cases import OPS, normed_cases, normed_variants
from llmfw.kernels.cupy import normed_linear
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.gemv import Gemv
from llmfw.kernels.cupy.products import Variant
from llmfw.kernels.cupy.streamed import Streamed
from llmfw.kernels.cupy.tune import Contest
from llmfw.ops.check import check_kernel
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DeviceInfo, OpContext

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
QUICK = {  # a row more than a warp's passes take, and more tiles than blocks
    "add_linear-bfloat16-1x192-136",
    "add_linear-bfloat16-17x1000-264",
    "normed_gated_linear-bfloat16-8x192-136b",
}
ODD = (65,)  # rows that no variant serves


def rows_of(case: Case) -> int:
    return int(case.facts["rows"])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, root: Path) -> torch.device:
    monkeypatch.setenv("LLMFW_TUNE", "off")
    folder = root / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    return emulator.install(monkeypatch, folder)


def parameters(served: bool = False) -> list[object]:
    """Small cases, of which few are quick; `served`: those of as many rows as variants serve."""
    cases = [case for case in normed_cases() if not case.wide]
    if served:
        cases = [case for case in cases if rows_of(case) not in ODD]
    assert {str(case) for case in cases} >= QUICK
    return [
        pytest.param(case, id=str(case), marks=() if str(case) in QUICK else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("case", parameters(served=True))
def test_nothing_of_the_kernel_before_is_read_before_it_is_done(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches overlap: inputs are there only once the kernel has waited for the one before."""
    written = {"add_linear": (0, 2)}.get(case.op, (0, 1, 2))  # x, residual, squares
    for call in normed_variants(case.context(device), rows_of(case)):

        def late(*args: Any, call=call) -> object:
            places = [args[i] for i in written]
            pairs = [(place, place.clone()) for place in places]
            for place in places:
                place.fill_(float("nan"))
            monkeypatch.setattr(emulator.EmulatedLauncher, "late", pairs)
            return call(*args)

        check(case, late, device)


@pytest.mark.parametrize("case", parameters())
def test_every_variant_matches_its_reference(case: Case, device: torch.device) -> None:
    context = case.context(device)
    check(case, kernel_of(case, device).build(context), device)
    for call in normed_variants(context, rows_of(case)):
        check(case, call, device)


@pytest.mark.parametrize("op", OPS)
def test_what_kernels_cannot_serve_is_computed_by_the_product(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that `llmfw kernels check` draws: other rows, no squares, tensors that lie anywhere."""

    def some(contest: Contest, margin: float) -> dict[int, Variant]:
        gated = contest.weight_rows != contest.outputs
        return {1: Gemv(1, 2, 2, gated=gated), 8: Streamed(64, 2, gated=gated)}

    monkeypatch.setattr(normed_linear, "choices", some)
    kernel = next(kernel for kernel in KERNELS if kernel.op == op)
    info = DeviceInfo(device, FEATURES)
    shape = next(shape for shape in INPUTS[op].shapes if shape["in_features"] == 64)
    report = check_kernel(kernel, info, shapes=[shape])
    assert report.passed, report.failures
    served = kernel.build(OpContext(op, torch.bfloat16, info, shape)).serves_rows
    assert [rows for rows in range(70) if served(rows)] == list(range(1, 9))
