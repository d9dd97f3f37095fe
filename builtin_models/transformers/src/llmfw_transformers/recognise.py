"""Which of transformers' modules do what a layer of ours does: tried on numbers, not by names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmfw.layers.activation import ACTIVATIONS
from llmfw.ops import reference

_RTOL, _ATOL = 1e-5, 1e-6
_FAINT = 1e-3  # of such inputs eps decides the result


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension, in the words of core's `norm` layers."""

    kind: str
    size: int
    eps: float
    offset: float = 0.0

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What core's layer gives."""
        if self.kind == "layer":
            return reference.layer_norm(x, weight, None, self.eps)
        return reference.rms_norm(x, weight, self.eps, self.offset)


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module with one vector of weights computes; None where it is no such norm.

    Its float attributes are tried as eps, with and without an offset of one.
    """
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or _has_parts(module):
        return None
    size = parameters["weight"].shape[0]
    trial = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight = 1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float32)
        x = torch.randn(4, size, generator=generator, dtype=torch.float32)
        trial.weight = nn.Parameter(weight, requires_grad=False)
        inputs = (x, x * _FAINT, x + 1)
        try:
            found = [trial(each) for each in inputs]
        except Exception:
            return None  # it takes other arguments: no norm of ours
        for norm in _candidates(trial, size):
            wanted = [norm.apply(each, weight) for each in inputs]
            if all(map(_equal, found, wanted)):
                return norm
    return None


def _candidates(module: nn.Module, size: int) -> Iterator[Norm]:
    for eps in dict.fromkeys(_floats(module)):
        yield Norm("rms", size, eps)
        yield Norm("rms", size, eps, offset=1.0)
        yield Norm("layer", size, eps)


def _floats(module: nn.Module) -> Iterator[float]:
    for value in vars(module).values():
        if isinstance(value, float) and 0 < value < 1:
            yield value


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or any(True for _ in module.buffers())


def _equal(found: Any, wanted: torch.Tensor) -> bool:
    return (
        isinstance(found, torch.Tensor)
        and found.shape == wanted.shape
        and found.dtype == wanted.dtype
        and torch.allclose(found, wanted, rtol=_RTOL, atol=_ATOL)
    )


@dataclass(frozen=True)
class Gated:
    """A gated MLP in the words of core's `mlp` layers: down(act(gate(x)) * up(x))."""

    hidden_size: int
    intermediate_size: int
    bias: bool
    activation: str


_NARROW, _INNER = 6, 10  # of the copy that is tried; a model's own matrices may be large


def gated_mlp_of(module: nn.Module) -> Gated | None:
    """The gated MLP that a module computes; None where it computes something else.

    Its linear layers have to be called gate_proj, up_proj and down_proj, or gate_up_proj and
    down_proj, as core's are. A narrow copy is tried with each activation that core has fused.
    """
    linears = {name: each for name, each in module.named_children() if type(each) is nn.Linear}
    fused = set(linears) == {"gate_up_proj", "down_proj"}
    if not fused and set(linears) != {"gate_proj", "up_proj", "down_proj"}:
        return None
    if len(list(module.parameters())) != sum(len(list(x.parameters())) for x in linears.values()):
        return None
    down = linears["down_proj"]
    biases = {each.bias is not None for each in linears.values()}
    if len(biases) != 1 or any(True for _ in module.buffers()):
        return None
    has_bias = biases.pop()
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        inner = 2 * _INNER if fused else _INNER
        narrow = {
            name: _random_linear(
                (_NARROW, _INNER) if name == "down_proj" else (inner, _NARROW), has_bias, generator
            )
            for name in linears
        }
        trial = copy.copy(module)
        trial._modules = {**module._modules, **narrow}
        x = torch.randn(1, 3, _NARROW, generator=generator, dtype=torch.float32)
        try:
            found = trial(x)
        except Exception:
            return None  # it takes other arguments, or reads sizes of its configuration
        first = ["gate_up_proj"] if fused else ["gate_proj", "up_proj"]
        gate, up = torch.cat([narrow[name](x) for name in first], -1).chunk(2, -1)
        for name in _ACTIVATIONS:
            if _equal(found, narrow["down_proj"](ACTIVATIONS[name](gate) * up)):
                return Gated(down.out_features, down.in_features, has_bias, name)
    return None


_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")


def _random_linear(shape: tuple[int, int], bias: bool, generator: torch.Generator) -> nn.Module:
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.float32)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    return linear
