"""Reading straight into parameters of another device, piece by piece; the CPU stands for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmfw.errors import UsageError
from llmfw.weights import open_checkpoint
from llmfw.weights.device_reader import StagedCheckpoint, pinned_loading
from llmfw.weights.expressions import Concat, Source
from llmfw.weights.loader import READERS, default_threads

CPU = torch.device("cpu")


def test_the_switch(monkeypatch) -> None:
    assert pinned_loading()
    monkeypatch.setenv("LLMFW_PINNED_LOADING", "off")
    assert not pinned_loading()
    monkeypatch.setenv("LLMFW_PINNED_LOADING", "maybe")
    with pytest.raises(UsageError, match="LLMFW_PINNED_LOADING is 'maybe'"):
        pinned_loading()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(13, 8),
        "other": torch.randn(5, 8),
        "vector": torch.randn(7),
        "scalar": torch.tensor(3.0),
        "wide": torch.randn(2, 100),
        "stack": torch.randn(3, 4, 2),
    }


@pytest.fixture
def staged(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> StagedCheckpoint:
    """Two rows of `matrix` fit into a buffer, a row of `wide` does not."""
    save_file(tensors, tmp_path / "model.safetensors")
    return StagedCheckpoint(open_checkpoint(tmp_path), CPU, stage_bytes=70)


def source(staged: StagedCheckpoint, name: str) -> Source:
    return Source(name, staged.info(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_arrives_in_any_dtype(staged, tensors, dtype) -> None:
    for name, value in tensors.items():
        out = torch.full(value.shape, float("nan"), dtype=dtype)
        source(staged, name).write(out, staged)
        assert torch.equal(out, value.to(dtype)), name


def test_what_goes_through_the_buffers(staged, tensors) -> None:
    through = {n for n, v in tensors.items() if staged.reads_into(n, torch.empty_like(v))}
    assert through == {"matrix", "other", "vector", "stack"}
    assert not staged.reads_into("matrix", torch.empty(8, 13).T)
    assert not staged.reads_into("matrix", torch.empty(13, 8, device="meta"))
    assert not staged.reads_into("matrix", torch.empty(0, 8))


def test_pieces_are_no_larger_than_a_buffer(staged, tensors, monkeypatch) -> None:
    pieces = []
    inner = staged._inner
    read_into = inner.read_into

    def noted(name, out, start=0):
        pieces.append((name, start, out.shape[0]))
        read_into(name, out, start)

    monkeypatch.setattr(inner, "read_into", noted)
    out = torch.empty(6, 8)
    source(staged, "matrix").narrow(0, 3, 9).write(out, staged)
    assert torch.equal(out, tensors["matrix"][3:9])
    assert pieces == [("matrix", 3, 2), ("matrix", 5, 2), ("matrix", 7, 2)]


def test_fused_parameters(staged, tensors) -> None:
    out = torch.empty(18, 8)
    Concat((source(staged, "matrix"), source(staged, "other")), 0).write(out, staged)
    assert torch.equal(out, torch.cat((tensors["matrix"], tensors["other"])))


def test_it_is_a_checkpoint(staged, tensors) -> None:
    assert (staged.format, staged.path.is_dir()) == ("safetensors", True)
    assert set(staged.names()) == set(tensors)
    assert torch.equal(staged.tensor("wide"), tensors["wide"])
    assert torch.equal(staged.slice("wide", 1, 2, 5), tensors["wide"][:, 2:5])


def test_threads_are_no_more_than_cores(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert default_threads(gpu) == 2
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert default_threads(gpu) == READERS
    assert default_threads(CPU) == 1
