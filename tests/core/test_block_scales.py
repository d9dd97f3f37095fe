"""Float8 weights with a scale for each block: what is read, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llmfw.errors import CheckpointError, WeightError
from llmfw.weights import load_weights, open_checkpoint, plan_weights
from llmfw.weights.block_scales import BlockScaledCheckpoint

BLOCK = (4, 8)
WEIGHT, SCALES = "up.weight", "up.weight_scale_inv"


def quantised(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    return {WEIGHT: weight, SCALES: torch.rand(blocks, generator=generator) + 0.1}


def written(folder: Path, tensors: dict[str, torch.Tensor], block: object = BLOCK) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (10, 19), (3, 5)])
def test_each_block_is_multiplied_by_its_scale(rows: int, columns: int, tmp_path: Path):
    tensors = {**quantised(rows, columns), "norm.weight": torch.ones(3)}
    checkpoint = open_checkpoint(written(tmp_path, tensors))
    assert set(checkpoint.names()) == {WEIGHT, "norm.weight"}
    info = checkpoint.info(WEIGHT)
    assert (info.shape, info.dtype) == ((rows, columns), torch.float32)
    assert "F8_E4M3" in info.stored
    expected = tensors[WEIGHT].float()
    for row in range(rows):
        for column in range(columns):
            expected[row, column] *= tensors[SCALES][row // BLOCK[0], column // BLOCK[1]]
    assert torch.equal(checkpoint.tensor(WEIGHT), expected)
    assert torch.equal(checkpoint.slice(WEIGHT, 0, 1, 3), expected[1:3])
    assert torch.equal(checkpoint.slice(WEIGHT, 1, 2, columns), expected[:, 2:])
    assert torch.equal(checkpoint.slice("norm.weight", 0, 1, 2), torch.ones(1))


def test_a_model_is_filled_with_the_values(tmp_path: Path):
    checkpoint = open_checkpoint(written(tmp_path, quantised(8, 16)))
    model = nn.Module()
    model.up = nn.Linear(16, 8, bias=False, device="meta", dtype=torch.bfloat16)
    load_weights(model, plan_weights(model, checkpoint), checkpoint)
    assert torch.equal(model.up.weight, checkpoint.tensor(WEIGHT).to(torch.bfloat16))


def test_blocks_are_128_wide_where_nobody_says(tmp_path: Path):
    tensors = quantised(130, 64)
    tensors[SCALES] = torch.ones(2, 1)
    folder = written(tmp_path, tensors)
    (folder / "config.json").unlink()
    assert isinstance(open_checkpoint(folder), BlockScaledCheckpoint)


def test_what_does_not_fit_is_named(tmp_path: Path):
    tensors = quantised(8, 16)
    with pytest.raises(CheckpointError, match=r"up\.weight_scale_inv has no weight beside it"):
        open_checkpoint(written(tmp_path / "lone", {SCALES: tensors[SCALES]}))
    wrong = {**tensors, SCALES: torch.ones(3, 2)}
    with pytest.raises(CheckpointError, match=r"has shape \[3, 2\], which are not the blocks"):
        open_checkpoint(written(tmp_path / "wrong", wrong))
    with pytest.raises(CheckpointError, match=r"weight_block_size \[128\] is no size of a block"):
        open_checkpoint(written(tmp_path / "block", tensors, [128]))


def test_float8_without_scales_fills_nothing(tmp_path: Path):
    checkpoint = open_checkpoint(written(tmp_path, {WEIGHT: quantised(8, 16)[WEIGHT]}))
    model = nn.Module()
    model.up = nn.Linear(16, 8, bias=False, device="meta", dtype=torch.bfloat16)
    with pytest.raises(WeightError, match=r"dtype +up\.weight: the tensor is float8_e4m3fn"):
        plan_weights(model, checkpoint)
