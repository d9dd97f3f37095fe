"""Products that share an RMS norm on the CPU emulator: every variant, clusters, several tiles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gpu.emulated import emulator
from gpu.kernel_cases import Case, check, kernel_of
from gpu.normed_cases import normed_cases, normed_variants

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
QUICK = {  # a row more than a warp's passes take, and more tiles than blocks
    "add_linear-bfloat16-2x192-136",
    "add_linear-bfloat16-17x1000-264",
    "normed_linear-bfloat16-4x1000-264",
    "normed_gated_linear-bfloat16-8x192-136b",
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, root: Path) -> torch.device:
    monkeypatch.setenv("LLMFW_TUNE", "off")
    folder = root / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    return emulator.install(monkeypatch, folder)


def parameters() -> list[object]:
    """Small cases, of which few are quick."""
    cases = [case for case in normed_cases() if not case.wide]
    assert {str(case) for case in cases} >= QUICK
    return [
        pytest.param(case, id=str(case), marks=() if str(case) in QUICK else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("case", parameters())
def test_every_variant_matches_its_reference(case: Case, device: torch.device) -> None:
    context = case.context(device)
    check(case, kernel_of(case, device).build(context), device)
    for call in normed_variants(context, int(case.facts["rows"])):
        check(case, call, device)
