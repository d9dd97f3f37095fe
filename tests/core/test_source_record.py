"""What a checkpoint keeps of its source: headers to plan from, digests to prove by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gguf_files import decoder_tensors, write_gguf
from llmfw.errors import CheckpointError
from llmfw.weights import open_checkpoint
from llmfw.weights.source_record import NAME, read_source, record_source


def shards(folder: Path) -> Path:
    for number in (1, 2):
        tensors = {f"layers.{number}.weight": torch.full((2, number), float(number))}
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
    return folder


def test_headers_come_back_as_they_were(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shards(tmp_path))
    record = record_source(checkpoint)
    (tmp_path / NAME).write_text(record.to_json())
    again = read_source(tmp_path)
    assert again == record
    headers = record.headers()
    assert headers.names() == checkpoint.names()
    for name in checkpoint.names():
        assert headers.info(name) == checkpoint.info(name)
        with pytest.raises(CheckpointError, match="only its header was kept"):
            headers.tensor(name)
        with pytest.raises(CheckpointError, match="only its header was kept"):
            headers.slice(name, 0, 0, 1)
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        headers.info("x")


def test_the_digest_is_that_of_the_list_that_sha256sum_prints(tmp_path: Path) -> None:
    record = record_source(open_checkpoint(shards(tmp_path)))
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    lines = [
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    ]
    assert record.digest == f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def test_gguf_headers_come_back_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", decoder_tensors()))
    record = record_source(checkpoint)
    (tmp_path / NAME).write_text(record.to_json())
    headers = read_source(tmp_path)
    assert headers is not None
    found = headers.headers()
    assert found.format == "gguf"
    assert {name: found.info(name) for name in found.names()} == {
        name: checkpoint.info(name) for name in checkpoint.names()
    }


def test_none_is_kept_or_it_is_damaged(tmp_path: Path) -> None:
    assert read_source(tmp_path) is None
    for text in ("{", "[]", '{"format": "safetensors", "files": [{"nome": 1}]}'):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(CheckpointError, match="is no record of a source"):
            read_source(tmp_path)
