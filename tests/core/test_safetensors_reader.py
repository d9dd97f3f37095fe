"""Safetensors: what opens, and every way in which a file can be damaged or unsafe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmfw.errors import CheckpointError
from llmfw.weights import open_checkpoint
from llmfw.weights.checkpoint import ReadsInto
from llmfw.weights.safetensors_header import read_header

A, B = torch.arange(12.0).reshape(3, 4), torch.arange(5, dtype=torch.bfloat16)
INDEX = "model.safetensors.index.json"


def write_raw(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": names if weight_map is None else weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("layout", ["file", "directory", "other name", "index", "shards alone"])
def test_layouts_that_open(tmp_path: Path, layout: str) -> None:
    path = tmp_path
    if layout in ("index", "shards alone"):
        sharded(tmp_path)
        if layout == "shards alone":
            (tmp_path / INDEX).unlink()
    else:
        name = "weights.safetensors" if layout == "other name" else "model.safetensors"
        save_file({"a": A, "b": B}, tmp_path / name)
        path = tmp_path / name if layout == "file" else tmp_path
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "safetensors"
    assert set(checkpoint.names()) == {"a", "b"}
    info = checkpoint.info("b")
    assert (info.shape, info.dtype, info.nbytes, info.stored) == ((5,), torch.bfloat16, 10, "BF16")
    assert torch.equal(checkpoint.tensor("a"), A)
    assert torch.equal(checkpoint.slice("a", 0, 1, 3), A[1:3])
    assert torch.equal(checkpoint.slice("a", 1, 2, 3), A[:, 2:3])
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        checkpoint.tensor("c")


def test_shards_behind_links_open_as_in_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    sharded(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert len(open_checkpoint(tmp_path / "snapshot").names()) == 2


DAMAGED: dict[str, tuple[Any, bytes, str]] = {
    "too long a header": (b"", b"", ""),
    "no JSON": (b"{nonsense", b"", "not JSON"),
    "no UTF-8": (b"\xff\xfe{}", b"", "not JSON"),
    "a list": ([], b"", "not a JSON object"),
    "no shape": ({"w": {"dtype": "F32"}}, b"", "tensor 'w': its header entry lacks"),
    "unknown dtype": ({"w": entry(0, 4, [1], "Q9")}, b"1234", "tensor 'w': dtype 'Q9'"),
    "negative shape": ({"w": entry(0, 4, [-1])}, b"1234", "tensor 'w': shape [-1]"),
    "boolean shape": ({"w": entry(0, 4, [True])}, b"1234", "tensor 'w': shape [True]"),
    "wrong length": (
        {"w": entry(0, 8, [1])},
        b"12345678",
        "takes 4 bytes, its data_offsets give 8",
    ),
    "no data": ({"w": entry(0, 0, [0])}, b"", "tensor 'w': it has no data"),
    "reversed": ({"w": entry(4, 0, [1])}, b"1234", "its data_offsets give -4"),
    "overlap": (
        {"v": entry(0, 8, [2]), "w": entry(4, 12, [2])},
        b"x" * 12,
        "tensor 'w': its data [4, 12) overlaps",
    ),
    "gap": ({"v": entry(0, 4, [1]), "w": entry(8, 12, [1])}, b"x" * 12, "tensor 'w'"),
    "truncated": (
        {"v": entry(0, 4, [1]), "w": entry(4, 12, [2])},
        b"x" * 9,
        "tensor 'w': its data ends",
    ),
    "excess": ({"w": entry(0, 4, [1])}, b"x" * 9, "5 bytes after the last tensor"),
    "twice": (
        b'{"w": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "w": 1}',
        b"1234",
        "tensor 'w': the header has it twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_names_file_and_tensor(tmp_path: Path, case: str) -> None:
    header, data, text = DAMAGED[case]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    if case == "too long a header":
        file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
        text = "its header claims 1099511627776"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in caught.value.message
    assert text in caught.value.message
    assert caught.value.hint


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), bit=st.integers(0, 7))
def test_any_cut_or_flipped_header_bit_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"a": A, "b": B}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError):
        read_header(file)
    changed = bytearray(whole)
    changed[flip % len(whole)] ^= 1 << bit
    file.write_bytes(changed)
    try:
        infos = read_header(file)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos.values()) == A.nbytes + B.nbytes


def test_an_index_naming_a_missing_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors \(tensor 'b'\)"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="shards missing: model-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:x", ""]
)
def test_an_index_reaching_outside_its_directory(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": name})
    with pytest.raises(CheckpointError, match=r"tensor 'b': file .* lies outside"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        (
            {"a": "model-00002-of-00002.safetensors"},
            "tensor 'a' is in the index but not in the file",
        ),
        (
            {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
            "tensor 'a': the index says model-00002-of-00002.safetensors, it is in model-00001",
        ),
        (
            {
                name: f"model-0000{n}-of-00002.safetensors"
                for name, n in (("a", 1), ("b", 2), ("c", 2))
            },
            "tensor 'c' is in the index but not in the file",
        ),
    ],
)
def test_an_index_that_contradicts_the_files(
    tmp_path: Path, weight_map: dict[str, str], text: str
) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert text in caught.value.message


def test_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": A, "extra": B}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'extra' is not in the index"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' is in two files"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["not json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B}, file)
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    last = checkpoint.names()[-1]
    with pytest.raises(CheckpointError, match=f"tensor '{last}': cannot be read"):
        checkpoint.tensor(last)
    with pytest.raises(CheckpointError, match=f"tensor '{last}': cannot be read: .*shorter"):
        checkpoint.read_into(last, torch.empty_like({"a": A, "b": B}[last]))


def test_reading_straight_into_a_tensor(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "c": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, ReadsInto)
    out = torch.zeros(5, 4)
    checkpoint.read_into("a", out[1:3], start=1)
    assert torch.equal(out, torch.cat([torch.zeros(1, 4), A[1:], torch.zeros(2, 4)]))
    scalar = torch.zeros(())
    checkpoint.read_into("c", scalar)
    assert scalar == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_cure(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="is a pickle") as caught:
            open_checkpoint(path)
        assert "safe_serialization=True" in str(caught.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights there"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        open_checkpoint(tmp_path / "x.txt")
    for name in ("one", "two"):
        save_file({"a": A}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files, none of them"):
        open_checkpoint(tmp_path)
