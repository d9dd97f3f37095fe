"""Checksums of tensors that are read whole, row after row, or here and there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmfw.errors import CheckpointError
from llmfw.weights.checked_reader import CheckedCheckpoint
from llmfw.weights.checksums import bytes_of, checksum
from llmfw.weights.device_reader import StagedCheckpoint

ROWS = 6
TENSORS = {
    "matrix": torch.arange(ROWS * 4, dtype=torch.float32).view(ROWS, 4),
    "odd": torch.arange(ROWS * 3, dtype=torch.float16).view(ROWS, 3),  # 6 bytes a row
    "number": torch.tensor(3.0),
}


def opened(folder: Path, spoilt: str | None = None, in_parts: bool = False) -> CheckedCheckpoint:
    """The last element of `spoilt` is another one than was summed up."""
    tensors = {name: value.clone() for name, value in TENSORS.items()}
    if spoilt is not None:
        bytes_of(tensors[spoilt])[-1] ^= 1
    save_file(tensors, folder / "model.safetensors")
    checksums = {name: checksum(value) for name, value in TENSORS.items()}
    return CheckedCheckpoint(folder / "model.safetensors", checksums, in_parts)


def whole(checkpoint: CheckedCheckpoint, name: str) -> None:
    checkpoint.tensor(name)


def in_rows(checkpoint: CheckedCheckpoint, name: str) -> None:
    for row in range(ROWS):
        checkpoint.slice(name, 0, row, row + 1)


def backwards(checkpoint: CheckedCheckpoint, name: str) -> None:
    for row in reversed(range(ROWS)):
        checkpoint.slice(name, 0, row, row + 1)


def in_columns(checkpoint: CheckedCheckpoint, name: str) -> None:
    checkpoint.slice(name, 1, 0, 2)


def into(checkpoint: CheckedCheckpoint, name: str) -> None:
    checkpoint.read_into(name, torch.empty_like(TENSORS[name]))


def through_buffers(checkpoint: CheckedCheckpoint, name: str) -> None:
    staged = StagedCheckpoint(checkpoint, torch.device("cpu"), stage_bytes=33)
    staged.read_into(name, torch.empty_like(TENSORS[name]))


WAYS = (whole, in_rows, backwards, in_columns, into, through_buffers)


@pytest.mark.parametrize("name", ["matrix", "odd"])
@pytest.mark.parametrize("way", WAYS)
def test_a_changed_byte_is_noticed_whichever_way_it_is_read(way, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is not what was written"):
        way(opened(tmp_path, name), name)
    for sound in (opened(tmp_path), opened(tmp_path, "number")):
        way(sound, name)
        way(sound, name)


def test_a_number_too(tmp_path: Path) -> None:
    opened(tmp_path).tensor("number")
    with pytest.raises(CheckpointError, match="its checksum differs"):
        into(opened(tmp_path, "number"), "number")


@pytest.mark.parametrize("name", ["matrix", "odd"])
def test_rows_again_and_again_are_no_damage(name: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    for start, stop in ((0, 4), (0, 2), (2, 4), (2, 4), (0, 4), (4, 6)):
        value = checkpoint.slice(name, 0, start, stop)
        assert torch.equal(value, TENSORS[name][start:stop])


def test_parts_that_nobody_completes_are_compared_before(tmp_path: Path) -> None:
    opened(tmp_path, "matrix").slice("matrix", 0, 0, 2)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        opened(tmp_path, "matrix", in_parts=True).slice("matrix", 0, 0, 2)
    whole(opened(tmp_path, in_parts=True), "matrix")


def test_without_a_checksum_nothing_is_compared(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for way in WAYS:
        way(CheckedCheckpoint(tmp_path / "model.safetensors", {}), "matrix")
