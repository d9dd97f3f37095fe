"""Small modules that declare shards and parallelism as the layers do, for the tests of weights."""

from __future__ import annotations

import torch
from torch import nn

from llmfw.weights import Shard


class FakeLinear(nn.Module):
    """A weight [out, in] and perhaps a bias, on the meta device."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        shards: tuple[Shard, ...] = (),
        parallel: str | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weight = meta_parameter(features_out, features_in, dtype=dtype)
        self.bias = meta_parameter(features_out, dtype=dtype) if bias else None
        self.weight_shards = shards
        self.parallel = parallel


class FakeAttention(nn.Module):
    """q, k and v fused (8, 4 and 4 rows over all ranks), and an output projection."""

    def __init__(self, tp_size: int = 1, bias: bool = False) -> None:
        super().__init__()
        shards = (Shard("q_proj", 8), Shard("k_proj", 4), Shard("v_proj", 4))
        self.qkv_proj = FakeLinear(8, 16 // tp_size, shards, "column", bias)
        self.o_proj = FakeLinear(8 // tp_size, 8, parallel="row", bias=bias)


class FakeDecoder(nn.Module):
    """Embedding, layers, norm, and a head that may share the embedding's parameter."""

    def __init__(self, layers: int = 2, tp_size: int = 1, tied: bool = False) -> None:
        super().__init__()
        self.embed = FakeLinear(8, 10)
        self.layers = nn.ModuleList(FakeAttention(tp_size) for _ in range(layers))
        self.norm = nn.Module()
        self.norm.weight = meta_parameter(8)
        self.head = FakeLinear(8, 10)
        if tied:
            self.head.weight = self.embed.weight


def meta_parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta", dtype=dtype), requires_grad=False)


def decoder_tensors(
    layers: int = 2, *, seed: int = 0, head: bool = True
) -> dict[str, torch.Tensor]:
    """A checkpoint for `FakeDecoder`, with its logical names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"embed.weight": draw(10, 8), "norm.weight": draw(8)}
    for layer in range(layers):
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            tensors[f"layers.{layer}.{name}.weight"] = draw(rows, 8)
    if head:
        tensors["head.weight"] = draw(10, 8)
    return tensors


def module_of(parameters: dict[str, torch.Tensor]) -> nn.Module:
    """A module with meta parameters of these names (no dots), shapes and dtypes."""
    module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, meta_parameter(*value.shape, dtype=value.dtype))
    return module
