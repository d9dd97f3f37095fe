"""Files of weights written by pieces: in any order, by several processes, as the library would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfw.errors import CheckpointError
from llmfw.weights.safetensors_header import read_header, read_header_text
from llmfw.weights.safetensors_writer import SafetensorsWriter, by_alignment, header_text

TENSORS = {
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "wide": torch.randn(3, 2),
    "half": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
}
DECLARED = {name: (tuple(value.shape), value.dtype) for name, value in TENSORS.items()}


def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, header_text(by_alignment(DECLARED))) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
        writer.sync()
    found = load_file(file)
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_each_tensor_begins_at_a_multiple_of_its_elements(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    SafetensorsWriter(file, header_text(by_alignment(DECLARED))).close()
    for info in read_header(file).values():
        assert info.offset % info.dtype.itemsize == 0


def test_a_header_of_another_writer_gives_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(TENSORS, first, metadata={"format": "pt", "by": "somebody"})
    with SafetensorsWriter(second, read_header_text(first)[0]) as writer:
        for name, value in TENSORS.items():
            writer.write(name, value)
    assert second.read_bytes() == first.read_bytes()


def test_a_file_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    file, header = tmp_path / "x.safetensors", header_text(DECLARED)
    with SafetensorsWriter(file, header) as writer:
        assert writer.is_new
        writer.write("wide", TENSORS["wide"])
    with SafetensorsWriter(file, header) as writer:
        assert not writer.is_new
        writer.write("half", TENSORS["half"])
    assert torch.equal(load_file(file)["wide"], TENSORS["wide"])
    assert torch.equal(load_file(file)["half"], TENSORS["half"])


@pytest.mark.parametrize("there", [b"", b"something else", b"\x08" + b"\0" * 7 + b"{}      "])
def test_anything_else_is_written_anew(tmp_path: Path, there: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(there)
    with SafetensorsWriter(file, header_text(DECLARED)) as writer:
        assert writer.is_new
    assert set(load_file(file)) == set(TENSORS)


def test_a_header_that_leaves_a_gap_is_refused(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}'
    with pytest.raises(CheckpointError, match="belong to no tensor"):
        SafetensorsWriter(tmp_path / "x.safetensors", text)
