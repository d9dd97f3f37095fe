"""Compiled kernels and timings that an engine directory brings along; the compiler is a fake."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmfw import cache
from llmfw.kernels.cupy import compile as compiling
from llmfw.kernels.cupy import tune
from llmfw.ops.kernel import DeviceInfo, OpContext


class FakeNvrtc(ModuleType):
    """NVRTC that notes what it compiles."""

    def __init__(self) -> None:
        super().__init__("cupy.cuda.nvrtc")
        self.compiled: list[str] = []

    def getVersion(self) -> tuple[int, int]:
        return (12, 8)


@pytest.fixture
def nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cuda.nvrtc = fake  # type: ignore[attr-defined]
    cupy.cuda = cuda  # type: ignore[attr-defined]
    for name, module in {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nvrtc": fake}.items():
        monkeypatch.setitem(sys.modules, name, module)

    def run(source: str, options: tuple[str, ...]) -> bytes:
        fake.compiled.append(source)
        return b"machine code"

    monkeypatch.setattr(compiling, "_run_nvrtc", run)
    monkeypatch.setattr(cache, "_ready_made", {})
    monkeypatch.setattr(cache, "_used", {})
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "first"))
    return fake


def test_what_was_compiled_serves_another_cache(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compiling.compile_cubin("norm.cu", "sm_90", {"DTYPE": 0})
    used = cache.used()
    (name,) = used
    assert name.startswith("kernels/norm-")
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "second"))
    cache.add_ready_made(used)
    assert compiling.compile_cubin("norm.cu", "sm_90", {"DTYPE": 0}) == code
    assert nvrtc.compiled == ["norm.cu"]
    compiling.compile_cubin("norm.cu", "sm_80", {"DTYPE": 0})
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (13, 0))
    compiling.compile_cubin("norm.cu", "sm_90", {"DTYPE": 0})
    assert nvrtc.compiled == ["norm.cu"] * 3


def test_timings_are_taken_along_and_added_to(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "first" / "kernels" / "tune-GPU-abc.json"
    first = tune._Table(path)
    first.put("a shape", {"1": {"otherwise": 2.0}})
    assert list(cache.used()) == ["kernels/tune-GPU-abc.json"]
    cache.add_ready_made(cache.used())
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "second"))
    moved = tmp_path / "second" / "kernels" / "tune-GPU-abc.json"
    second = tune._Table(moved)
    assert second.entries == {"a shape": {"1": {"otherwise": 2.0}}}
    second.put("another", {})
    assert set(json.loads(moved.read_text())["times"]) == {"a shape", "another"}
    assert set(json.loads(path.read_text())["times"]) == {"a shape"}


@dataclass(frozen=True)
class FakeVariant:
    """A kernel that only has a name."""

    name: str


def contest() -> tune.Contest:
    info = DeviceInfo(torch.device("cuda", 0), frozenset({"cuda"}))
    shape = {"in_features": 64, "out_features": 96, "bias": 0}
    fakes: Any = {1: (FakeVariant("slow"), FakeVariant("gemv_k2_u2")), 64: (FakeVariant("wide"),)}
    context = OpContext("linear", torch.bfloat16, info, shape)
    return tune.Contest(context, fakes, weight_rows=96, outputs=96, otherwise=torch.add)


def test_what_tuning_chose_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tune._Table(tmp_path / "tune.json")
    monkeypatch.setattr(tune._Table, "of", lambda index: table)
    competing = contest()
    times = {"1": {"otherwise": 5.2, "slow": 6.0, "gemv_k2_u2": 3.9}, "64": {"otherwise": 6.0}}
    table.put("bfloat16 64 -> 96", {**times, "64": {"otherwise": 6.0, "wide": 6.5}})
    monkeypatch.setenv("LLMFW_TUNE", "auto")
    told = tune.details(competing, tune.choices(competing))
    assert told == "1 row: gemv_k2_u2 3.9 us (otherwise 5.2)"
    table.put("bfloat16 64 -> 96", {**times, "64": {"otherwise": 6.0, "wide": 5.5}})
    told = tune.details(competing, tune.choices(competing))
    assert told.endswith("; up to 64 rows: wide 5.5 us (otherwise 6.0)")
    lost = {"1": {"otherwise": 1.0, "slow": 6.0, "gemv_k2_u2": 5.0}, "64": times["64"]}
    monkeypatch.setattr(tune, "measure", lambda contest: {**lost, "64": {**lost["64"], "wide": 7}})
    table.put("bfloat16 64 -> 96", lost)  # knows nothing of a variant of today: measured anew
    assert tune.details(competing, tune.choices(competing)) == "no own kernel"
    assert table.entries["bfloat16 64 -> 96"]["64"] == {"otherwise": 6.0, "wide": 7}
    monkeypatch.setenv("LLMFW_TUNE", "off")
    assert tune.details(competing, tune.choices(competing)) == "1 row: gemv_k2_u2"
