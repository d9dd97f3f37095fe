"""Compiled kernels and timings that an engine directory brings along; the compiler is a fake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmfw import cache
from llmfw.kernels.cupy import compile as compiling
from llmfw.kernels.cupy import tune


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
