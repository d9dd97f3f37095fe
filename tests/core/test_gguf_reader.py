"""GGUF files: HF's names, layouts and values; damage is an error that names the file."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import decoder_tensors, to_ggml_pairs, write_gguf
from llmfw.errors import CheckpointError
from llmfw.weights import Checkpoint, open_checkpoint
from llmfw.weights.gguf_header import read_gguf_header
from llmfw.weights.gguf_reader import GGUFCheckpoint
from llmfw.weights.gguf_tables import FAMILIES, WITH_EXPERTS, Family


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(file, decoder_tensors()).read_bytes()


def test_names_layouts_and_values_are_hf_s(tmp_path: Path) -> None:
    tensors = decoder_tensors(tied=False)
    q, k = torch.randn(64, 64), torch.randn(32, 64)
    tensors["blk.0.attn_q.weight"] = to_ggml_pairs(q, 4)
    tensors["blk.0.attn_k.weight"] = to_ggml_pairs(k, 2)
    tensors["blk.0.attn_q.bias"] = to_ggml_pairs(q[:, 0], 4).contiguous()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", tensors))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.format == "gguf"
    prefix = "model.layers.0.self_attn"
    assert torch.equal(checkpoint.tensor(f"{prefix}.q_proj.weight"), q)
    assert torch.equal(checkpoint.tensor(f"{prefix}.k_proj.weight"), k)
    assert torch.equal(checkpoint.tensor(f"{prefix}.q_proj.bias"), q[:, 0])
    assert torch.equal(
        checkpoint.tensor("model.layers.1.mlp.down_proj.weight"), tensors["blk.1.ffn_down.weight"]
    )
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tensors["output.weight"])
    assert len(checkpoint.names()) == len(tensors)


def test_tied_embeddings_have_no_head_and_rope_factors_are_no_weight(tmp_path: Path) -> None:
    tensors = decoder_tensors() | {"rope_freqs.weight": torch.ones(8)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", tensors))
    assert "lm_head.weight" not in checkpoint.names()
    assert not any("rope" in name for name in checkpoint.names())


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("F32", torch.float32, 0.0),
        ("F16", torch.float16, 1e-3),
        ("BF16", torch.bfloat16, 0.0),
        ("Q8_0", torch.float32, 0.02),
        ("Q4_1", torch.float32, 0.3),
    ],
)
def test_stored_types(tmp_path: Path, kind: str, dtype: torch.dtype, error: float) -> None:
    names = ["blk.0.ffn_up.weight", "blk.0.attn_q.weight"]
    tensors = decoder_tensors()
    file = write_gguf(tmp_path / "x.gguf", tensors, quantise=dict.fromkeys(names, kind))
    checkpoint = open_checkpoint(file)
    for name, expected in (
        ("model.layers.0.mlp.up_proj.weight", tensors[names[0]]),
        ("model.layers.0.self_attn.q_proj.weight", None),
    ):
        info, value = checkpoint.info(name), checkpoint.tensor(name)
        assert (info.stored, info.dtype, info.shape) == (kind, dtype, tuple(value.shape))
        assert value.dtype == dtype
        assert torch.equal(checkpoint.slice(name, 0, 3, 9), value[3:9])
        assert torch.equal(checkpoint.slice(name, 1, 3, 9), value[:, 3:9])
        if expected is not None:
            assert (value.float() - expected).abs().max() <= error


def test_norms_stored_with_one_added_come_back(tmp_path: Path) -> None:
    tensors = decoder_tensors()
    file = write_gguf(tmp_path / "x.gguf", tensors, arch="gemma2")
    checkpoint = open_checkpoint(file)
    for theirs, ours in (
        ("output_norm.weight", "model.norm.weight"),
        ("blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
    ):
        assert torch.equal(checkpoint.tensor(ours), tensors[theirs] - 1)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.tensor(q), tensors["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("arch", "family"), [*FAMILIES.items(), *WITH_EXPERTS.items()], ids=lambda value: str(value)[:9]
)
def test_the_name_table_agrees_with_gguf_s_own(arch: str, family: Family) -> None:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 1)
    known = 0
    for theirs, ours in family.top.items():
        mapped = names.get_name(ours)
        known += mapped is not None
        assert mapped in (theirs, None)
    for theirs, ours in family.block.items():
        mapped = names.get_name(f"{family.layer}.0.{ours}")
        if mapped is not None:  # the tables are shared: a family may lack some
            known += 1
            assert mapped == f"blk.0.{theirs.removesuffix('.weight')}"
    assert known >= 9


def test_the_header_agrees_with_gguf_s_own_reader(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(), metadata={"a.list": [1, 2, 3]})
    ours, theirs = read_gguf_header(file), gguf.GGUFReader(file)
    fields = {key: f for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, field in fields.items():
        assert ours.metadata[key] == field.contents()
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_an_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(whole) - 33))
    file = tmp_path_factory.mktemp("cut") / "x.gguf"
    file.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        GGUFCheckpoint(file)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_changed_byte_of_the_header_never_escapes_as_another_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    file = tmp_path_factory.mktemp("flip") / "x.gguf"
    file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    with contextlib.suppress(CheckpointError):
        checkpoint = GGUFCheckpoint(file)
        for name in checkpoint.names():
            assert checkpoint.tensor(name).shape == checkpoint.info(name).shape


def test_truncated_data_names_the_tensor(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole[:-4096])
    with pytest.raises(CheckpointError, match=r"tensor 'blk.1.ffn_down.weight' ends at byte"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_a_file_that_changes_after_it_was_opened(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(whole)
    checkpoint = GGUFCheckpoint(file)
    name = "model.layers.1.mlp.down_proj.weight"
    file.write_bytes(whole[:-4096])
    with pytest.raises(
        CheckpointError, match=r"'blk.1.ffn_down.weight': cannot be read: .*shorter"
    ):
        checkpoint.tensor(name)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.slice(name, 0, 1, 2)


def test_an_announced_size_beyond_the_file_ends_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(CheckpointError, match="more than it has bytes"):
        GGUFCheckpoint(file)


def test_what_is_not_served(tmp_path: Path) -> None:
    tensors = decoder_tensors()
    with pytest.raises(
        CheckpointError, match="architecture 'bloom' is not served; these are: llama"
    ):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, arch="bloom"))
    parts = write_gguf(tmp_path / "b.gguf", tensors, metadata={"split.count": 3})
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_checkpoint(parts)
    (tmp_path / "c.gguf").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_checkpoint(tmp_path / "c.gguf")
    (tmp_path / "d.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"d\.gguf"):
        open_checkpoint(tmp_path / "d.gguf")


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(), sizes={"attention.head_count": 7})
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight': 64 rows do not divide by 7"):
        open_checkpoint(file).tensor("model.layers.0.self_attn.q_proj.weight")


def test_a_directory_with_one_gguf_opens_and_with_two_asks(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", decoder_tensors())
    assert open_checkpoint(tmp_path).format == "gguf"
    write_gguf(tmp_path / "b.gguf", decoder_tensors())
    with pytest.raises(CheckpointError, match=r"several GGUF files: a.gguf, b.gguf"):
        open_checkpoint(tmp_path)
