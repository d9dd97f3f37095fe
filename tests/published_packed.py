"""Published checkpoints whose weights are packed, in small: float8 by blocks, and MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from published_layouts import tensors_of, write
from published_mxfp4 import blocks_and_scales

LLAMA, DEEPSEEK, GPT_OSS = "LlamaForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"


def float8(value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8, and a scale for each block of `block` x `block`."""
    generator = torch.Generator().manual_seed(value.numel())
    scales = torch.rand([-(-size // block) for size in value.shape], generator=generator) + 0.5
    return value.to(torch.float8_e4m3fn), scales


def packed_llama(folder: Path) -> Path:
    """All linear layers but k in float8: q, k and v are one parameter, of two dtypes."""
    tensors = {}
    for name, value in tensors_of(LLAMA).items():
        tensors[name] = value
        if "_proj." in name and "k_proj" not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = float8(value, 16)
    return _written(LLAMA, folder, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})


def packed_deepseek(folder: Path) -> Path:
    """As V3 is published: linear layers in float8, those of the ignored last layer too."""
    tensors = {}
    for name, value in tensors_of(DEEPSEEK).items():
        tensors[name] = value
        if value.ndim == 2 and "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = float8(value, 128)
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return _written(DEEPSEEK, folder, tensors, quantised)


def packed_gpt_oss(folder: Path) -> Path:
    """As gpt-oss is published: four-bit blocks and their scales in place of experts' matrices."""
    packed = blocks_and_scales()
    stems = {name.removesuffix("_blocks") for name in packed}
    kept = {name: value for name, value in tensors_of(GPT_OSS).items() if name not in stems}
    return _written(GPT_OSS, folder, {**kept, **packed}, {"quant_method": "mxfp4"})


PACKED: dict[str, Callable[[Path], Path]] = {
    "float8": packed_llama,
    "deepseek": packed_deepseek,
    "mxfp4": packed_gpt_oss,
}


def _written(
    architecture: str, folder: Path, tensors: dict[str, torch.Tensor], quantised: dict[str, object]
) -> Path:
    write(architecture, folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config))
    return folder
