"""Saving: a checkpoint comes back bit for bit, whole or not at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import llmfw.weights.writer
from llmfw.errors import CheckpointError, WeightError
from llmfw.weights import (
    MemoryCheckpoint,
    WeightMap,
    load_weights,
    open_checkpoint,
    plan_weights,
    save_checkpoint,
)
from llmfw.weights.plan import LoadPlan
from llmfw.weights.slots import OneRank
from weight_modules import FakeDecoder, decoder_tensors, module_of


def loaded(tensors: dict[str, torch.Tensor]) -> tuple[nn.Module, LoadPlan, MemoryCheckpoint]:
    model, checkpoint = FakeDecoder(tied=True), MemoryCheckpoint(tensors)
    plan = plan_weights(model, checkpoint)
    load_weights(model, plan, checkpoint, dtype="stored")
    return model, plan, checkpoint


def test_shards_with_an_index_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: value.bfloat16() for name, value in decoder_tensors().items()}
    tensors["norm.weight"] = tensors["norm.weight"].float()
    tensors["norm.weight"][0] = float("nan")
    tensors["layers.0.rotary_emb.inv_freq"] = torch.randn(4)
    model, plan, checkpoint = loaded(tensors)
    report = save_checkpoint(
        model, plan, tmp_path / "out", checkpoint=checkpoint, max_shard_bytes=300
    )
    saved = open_checkpoint(tmp_path / "out")
    assert set(saved.names()) == set(checkpoint.names())
    for name, value in tensors.items():
        assert saved.info(name).dtype == value.dtype
        assert torch.equal(saved.tensor(name).view(torch.uint8), value.view(torch.uint8))
    assert report.left_out == ()
    assert report.files[-1].name == "model.safetensors.index.json"
    index = json.loads(report.files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert len(report.files) > 3


def test_what_was_ignored_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, plan, _ = loaded(decoder_tensors())
    with caplog.at_level(logging.WARNING, "llmfw.weights"):
        report = save_checkpoint(model, plan, tmp_path / "out")
    assert report.left_out == ("head.weight",)
    assert "left out" in caplog.text
    assert [file.name for file in report.files] == ["model.safetensors"]


def test_a_model_without_the_ignored_part_of_a_tensor_is_not_saved(tmp_path: Path) -> None:
    rules = WeightMap().split("w", ["a", "b"]).ignore("b", "not needed")
    module, checkpoint = module_of({"a": torch.zeros(2)}), MemoryCheckpoint({"w": torch.ones(4)})
    plan = plan_weights(module, checkpoint, rules)
    load_weights(module, plan, checkpoint)
    with pytest.raises(WeightError, match="only a part of these tensors was loaded: w"):
        save_checkpoint(module, plan, tmp_path / "out")
    save_checkpoint(module, plan, tmp_path / "out", checkpoint=checkpoint)
    assert torch.equal(open_checkpoint(tmp_path / "out").tensor("w"), torch.ones(4))


def test_one_rank_of_several_is_not_saved(tmp_path: Path) -> None:
    module, checkpoint = module_of({"a": torch.zeros(2)}), MemoryCheckpoint({"a": torch.ones(2)})
    plan = plan_weights(module, checkpoint, mapping=OneRank(tp_size=2))
    with pytest.raises(WeightError, match="one of 2 ranks' parts"):
        save_checkpoint(module, plan, tmp_path / "out")


def test_repacked_weights_and_mixed_dtypes_are_told(tmp_path: Path) -> None:
    model, plan, checkpoint = loaded(decoder_tensors())
    model.norm.weight = nn.Parameter(torch.zeros(9))
    with pytest.raises(WeightError, match=r"norm.weight: its shape is \[9\] now"):
        save_checkpoint(model, plan, tmp_path / "out", checkpoint=checkpoint)
    rules = WeightMap().split("w", ["a", "b"]).dtype("a", torch.float64)
    module = module_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    whole = MemoryCheckpoint({"w": torch.ones(4)})
    mixed = plan_weights(module, whole, rules)
    load_weights(module, mixed, whole)
    with pytest.raises(WeightError, match="w: its parts are loaded as"):
        save_checkpoint(module, mixed, tmp_path / "out")


def test_a_directory_keeps_its_other_files_but_no_weights_are_overwritten(tmp_path: Path) -> None:
    model, plan, _ = loaded(decoder_tensors(head=False))
    (tmp_path / "config.json").write_text("{}")
    save_checkpoint(model, plan, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="there are weights already"):
        save_checkpoint(model, plan, tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, _ = loaded(decoder_tensors(head=False))
    written: list[Path] = []

    def fail_at_the_second(tensors: dict[str, torch.Tensor], file: Path, **kwargs: object) -> None:
        if written:
            raise OSError("disk full")
        written.append(file)
        save_file(tensors, file)

    monkeypatch.setattr(llmfw.weights.writer, "save_file", fail_at_the_second)
    with pytest.raises(CheckpointError, match="disk full"):
        save_checkpoint(model, plan, tmp_path / "out", max_shard_bytes=300)
    assert written
    assert list(tmp_path.iterdir()) == []
