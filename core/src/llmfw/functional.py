"""Functional ops under the names of TensorRT-LLM's older guide: thin names of torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llmfw.layers.activation import ACTIVATIONS

Tensor = torch.Tensor

add = torch.add
sub = torch.sub
mul = torch.mul
div = torch.div
exp = torch.exp
sqrt = torch.sqrt
tanh = torch.tanh
matmul = torch.matmul
softmax = torch.softmax
gelu = F.gelu
relu = F.relu
silu = F.silu
where = torch.where
ACT2FN = ACTIVATIONS


def concat(inputs: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Join tensors along a dimension."""
    return torch.cat(tuple(inputs), dim=dim)


def split(
    tensor: Tensor, split_size_or_sections: int | Sequence[int], dim: int = 0
) -> list[Tensor]:
    """Cut a tensor into parts of the given size or sizes."""
    sizes = split_size_or_sections
    return list(torch.split(tensor, sizes if isinstance(sizes, int) else list(sizes), dim=dim))


def view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same values in another shape."""
    return tensor.reshape(tuple(shape))


def permute(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Reorder the dimensions."""
    return tensor.permute(tuple(dims))


def transpose(tensor: Tensor, dim0: int, dim1: int) -> Tensor:
    """Swap two dimensions."""
    return tensor.transpose(dim0, dim1)


def sum(tensor: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """Sum over dimensions."""
    return torch.sum(tensor, dim=dim if isinstance(dim, int) else tuple(dim), keepdim=keepdim)


def mean(tensor: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """Mean over dimensions."""
    return torch.mean(tensor, dim=dim if isinstance(dim, int) else tuple(dim), keepdim=keepdim)


def pow(base: Tensor, exponent: float | Tensor) -> Tensor:
    """base to the power of exponent."""
    return torch.pow(base, exponent)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype."""
    return tensor.to(dtype)
