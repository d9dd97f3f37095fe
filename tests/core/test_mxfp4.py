"""MXFP4: values against gguf's and transformers' own dequantising, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmfw.errors import CheckpointError
from llmfw.weights import WeightMap, load_weights, open_checkpoint, plan_weights
from llmfw.weights.mxfp4 import Mxfp4Checkpoint, dequantise_mxfp4

EXPERTS, ROWS, WIDTH = 3, 6, 64


def stored(scale_bytes: tuple[int, int] = (100, 150)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (EXPERTS, ROWS, WIDTH // 32)
    blocks = torch.randint(256, (*shape, 16), generator=generator)
    scales = torch.randint(*scale_bytes, shape, generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def by_gguf(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """ggml keeps a block's first half in the low bits of its bytes and the second in the high."""
    low, high = blocks & 15, blocks >> 4
    elements = torch.stack((low, high), -1).flatten(-2)  # in order
    packed = elements[..., :16] | elements[..., 16:] << 4
    raw = torch.cat((scales[..., None], packed), -1).numpy()
    values = dequantize(np.ascontiguousarray(raw).reshape(-1, 17), GGMLQuantizationType.MXFP4)
    return torch.from_numpy(values).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("scale_bytes", [(100, 150), (0, 3), (250, 253)])
def test_the_values_are_ggufs(scale_bytes: tuple[int, int]):
    blocks, scales = stored(scale_bytes)
    values = dequantise_mxfp4(blocks, scales)
    assert (values.shape, values.dtype) == ((EXPERTS, ROWS, WIDTH), torch.bfloat16)
    assert torch.equal(values.float(), by_gguf(blocks, scales))


def test_the_values_are_transformers():
    blocks, scales = stored()
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(dequantise_mxfp4(blocks, scales).transpose(1, 2), theirs)


def test_a_scale_of_all_ones_is_no_number():
    blocks, scales = stored()
    scales[0, 1, 0] = 255
    missing = dequantise_mxfp4(blocks, scales).isnan()
    assert bool(missing[0, 1, :32].all())
    assert int(missing.sum()) == 32


def written(folder: Path, **changes: torch.Tensor | None) -> Path:
    blocks, scales = stored()
    tensors = {"w_blocks": blocks, "w_scales": scales, "norm": torch.ones(3), **changes}
    tensors["v_blocks"], tensors["v_scales"] = blocks, scales
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file({name: value.clone() for name, value in kept.items()}, folder / "model.safetensors")
    return folder


def test_names_shapes_and_slices(tmp_path: Path):
    checkpoint = open_checkpoint(written(tmp_path))
    assert isinstance(checkpoint, Mxfp4Checkpoint)
    assert set(checkpoint.names()) == {"w", "v", "norm"}
    info = checkpoint.info("w")
    assert (info.shape, info.dtype, info.stored) == ((3, WIDTH, ROWS), torch.bfloat16, "MXFP4")
    assert info.nbytes == EXPERTS * ROWS * 2 * 17
    whole = checkpoint.tensor("w")
    assert torch.equal(whole, dequantise_mxfp4(*stored()).transpose(1, 2))
    for dim, stop in enumerate((2, 9, 4)):
        assert torch.equal(checkpoint.slice("w", dim, 1, stop), whole.narrow(dim, 1, stop - 1))
    assert torch.equal(checkpoint.slice("norm", 0, 1, 2), torch.ones(1))


def test_parameters_of_any_float_are_filled(tmp_path: Path):
    model = nn.Module()
    for name, shape in {"w": (3, WIDTH, ROWS), "v": (3, WIDTH, ROWS), "norm": (3,)}.items():
        model.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    checkpoint = open_checkpoint(written(tmp_path))
    load_weights(model, plan_weights(model, checkpoint), checkpoint)
    assert model.w.dtype == torch.float32
    assert torch.equal(model.w, checkpoint.tensor("w").float())


@pytest.mark.parametrize("rearranged", [False, True])
def test_matrices_are_dequantised_one_at_a_time(
    rearranged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = nn.Module()
    shape = (3, ROWS, WIDTH) if rearranged else (3, WIDTH, ROWS)
    model.w = nn.Parameter(torch.empty(shape, device="meta"))
    table = WeightMap().ignore("v", "a second one").ignore("norm", "another")
    if rearranged:
        table = table.transpose("w").reorder("w", (-1, 2), (1, 0), dim=1)
    checkpoint = open_checkpoint(written(tmp_path))
    expected = checkpoint.tensor("w").float()
    if rearranged:
        expected = expected.transpose(1, 2)
        expected = torch.cat((expected[:, ::2], expected[:, 1::2]), 1)
    whole: list[str] = []
    monkeypatch.setattr(Mxfp4Checkpoint, "tensor", lambda self, name: whole.append(name))
    load_weights(model, plan_weights(model, checkpoint, table), checkpoint)
    assert torch.equal(model.w, expected)
    assert whole == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_scales": None}, "w_blocks has no w_scales beside it"),
        ({"w_blocks": None}, "w_scales has no w_blocks beside it"),
        ({"w_scales": torch.zeros(3, 6, 3, dtype=torch.uint8)}, "are no blocks of 32"),
        ({"w_scales": torch.zeros(3, 6, 2)}, "are no blocks of 32"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(written(tmp_path, **changes))
