"""Which kernel the kept times of a product choose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from llmfw.kernels.cupy import tune
from llmfw.kernels.cupy.products import BUCKETS, STREAMED_ROWS, TILED_ROWS
from llmfw.kernels.cupy.tune import MARGIN, NORMED_VALUES, OTHERWISE, Company, Contest, _Table
from llmfw.ops.kernel import DeviceInfo, OpContext

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


def context() -> OpContext:
    info = DeviceInfo(torch.device("cpu", 0), frozenset({"cuda"}))
    return OpContext("linear", torch.bfloat16, info, {"in_features": 64, "out_features": 96})


def test_a_shape_that_no_own_kernel_serves_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(contest: Contest) -> dict[str, dict[str, float]]:
        measured.append(contest.key)
        return {}

    monkeypatch.setenv("LLMFW_TUNE", "auto")
    monkeypatch.setattr(tune, "measure", measure)
    nobody = Contest(context(), dict.fromkeys(BUCKETS, ()), 96, 96, otherwise=torch.add)
    for _ in range(2):  # the second is another process, which finds the file
        table = _Table(tmp_path / "tune-gpu.json")
        monkeypatch.setattr(_Table, "of", lambda index, table=table: table)
        assert tune.choices(nobody) == tune.choices(nobody) == {}
    assert measured == [nobody.key]


@pytest.mark.parametrize("bucket", [STREAMED_ROWS[-1], *TILED_ROWS])
def test_products_of_many_rows_are_timed_behind_a_norm(
    bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []

    def rms_norm(context: OpContext) -> Callable[..., None]:
        def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
            assert x.shape[1:] == weight.shape == (context["hidden_size"],)
            assert x.dtype is weight.dtype is context.dtype
            ran.append(tuple(x.shape))

        return norm

    monkeypatch.setattr(tune, "rms_norm", rms_norm)
    for run in Company(bucket, context()).of([partial(ran.append, name) for name in ("a", "b")]):
        run()
    norm = [(bucket, NORMED_VALUES)] if bucket in TILED_ROWS else []
    assert ran == [*norm, "a", *norm, "b"]
