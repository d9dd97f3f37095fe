"""The CuPy kernels' logic on a CPU: the same sources, launchers and cases, by the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gpu.emulated import emulator
from gpu.kernel_cases import (
    Case,
    activation_cases,
    attention_cases,
    check,
    linear_cases,
    norm_cases,
    rope_cases,
)
from llmfw.kernels.cupy import linear
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.ops.kernel import load_object

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, root: Path) -> torch.device:
    folder = root / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    return emulator.install(monkeypatch, folder)


def run(case: Case, device: torch.device) -> None:
    kernel = next(k for k in KERNELS if k.op == case.op)
    context = case.context(device)
    assert kernel.refusal(context) is None
    check(case, load_object(kernel.factory)(context), device)


def small(cases: list[Case], every: int) -> list[object]:
    """Small cases as parameters; all but every so-many-th of bfloat16 are marked slow."""
    chosen = [case for case in cases if not case.wide]
    quick = [case for case in chosen if case.dtype == "bfloat16"][::every]
    return [
        pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow)
        for case in chosen
    ]


@pytest.mark.parametrize("case", small([*norm_cases(), *activation_cases(), *rope_cases()], 7))
def test_elementwise_kernels_match_their_references(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("case", small(list(attention_cases()), 7))
def test_paged_attention_matches_its_reference(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("case", small(list(linear_cases()), 25))
def test_every_product_variant_matches_its_reference(case: Case, device: torch.device) -> None:
    context = case.context(device)
    rows = int(case.label.split("x")[0])
    if rows > linear.BUCKETS[-1]:
        pytest.skip("cuBLAS' rows")
    bucket = linear.bucket_of(rows)
    for variant in linear.variants(bucket, context["in_features"], context.dtype):
        product = linear.product(variant, bucket, context)

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
            product(x, weight, bias, out, x.shape[0])  # noqa: B023
            return out

        check(case, call, device)
