"""Which kernel the kept times of a product choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfw.kernels.cupy.tune import MARGIN, OTHERWISE, _Table

TIMES = {"8": {"otherwise": 10.0, "slow": 11.0, "own": 10.1}, "16": {"otherwise": 5.0}}


@pytest.mark.parametrize(
    ("bucket", "margin", "best"),
    [
        (8, MARGIN, OTHERWISE),
        (8, 1.05, "own"),  # an own kernel that saves another one need not win alone
        (16, 1.05, OTHERWISE),
        (32, 1.05, OTHERWISE),
    ],
)
def test_the_best_own_kernel_serves_below_its_margin(
    bucket: int, margin: float, best: str, tmp_path: Path
) -> None:
    _Table(tmp_path / "tune-gpu.json").put("bfloat16 64 -> 64", TIMES)
    kept = _Table(tmp_path / "tune-gpu.json")
    assert kept.best("bfloat16 64 -> 64", bucket, margin) == best
