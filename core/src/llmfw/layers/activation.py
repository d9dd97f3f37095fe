"""Activation functions by the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from llmfw.errors import ConfigError

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GatedActivation:
    """What stands between a gated MLP's products where that is not act(gate) * up.

    Args:
        function: (gate, up), each [tokens, intermediate_size], to a tensor of that shape.
        code: The same for one value, as a C expression of the floats `gate` and `up`, in which
            CUDA's functions and `sigmoid`, `silu`, `gelu` and `gelu_tanh` may stand, as in
            "fminf(gate, 7.0f) * sigmoid(gate) * up". Kernels compile it into the product before;
            without it they leave gate and up to `function`.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    code: str = ""


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "tanh": torch.tanh,
}

GATED_OPS = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "gelu_new": "gelu_tanh_and_mul",
    "gelu_fast": "gelu_tanh_and_mul",
    "gelu_pytorch_tanh": "gelu_tanh_and_mul",
}


CODES = {
    "silu": "silu(gate) * up",
    "swish": "silu(gate) * up",
    "gelu": "gelu(gate) * up",
    "gelu_new": "gelu_tanh(gate) * up",
    "gelu_fast": "gelu_tanh(gate) * up",
    "gelu_pytorch_tanh": "gelu_tanh(gate) * up",
    "quick_gelu": "gate * sigmoid(1.702f * gate) * up",
    "relu": "fmaxf(gate, 0.0f) * up",
    "relu2": "fmaxf(gate, 0.0f) * fmaxf(gate, 0.0f) * up",
    "tanh": "tanhf(gate) * up",
}


def activation(name: str | Activation | GatedActivation) -> Activation:
    """The function of that name (a transformers `hidden_act`), or the function itself.

    Raises:
        ConfigError: If the name is not known, or it is one of a gated MLP only.
    """
    if isinstance(name, GatedActivation):
        raise ConfigError(
            "a GatedActivation has no meaning in a plain MLP",
            hint="give a function of one tensor, or build the gated MLP",
        )
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation {name!r} is not known", hint=f"known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def gated_op(name: str | Activation | GatedActivation) -> str | None:
    """The fused op "activation of the first half times the second half", if there is one."""
    if isinstance(name, str):
        return GATED_OPS.get(name)
    if isinstance(name, GatedActivation):
        return None
    return {F.silu: "silu_and_mul", F.gelu: "gelu_and_mul"}.get(name)


def gated_code(name: str | Activation | GatedActivation) -> str:
    """The gated activation as `GatedActivation.code` has it; "" where nobody wrote it in C."""
    if isinstance(name, GatedActivation):
        return name.code
    if isinstance(name, str):
        return CODES.get(name, "")
    return {F.silu: CODES["silu"], F.gelu: CODES["gelu"]}.get(name, "")


def gated_product(
    name: str | Activation | GatedActivation, config: ModelConfig[Any], intermediate_size: int
) -> Activation:
    """The function gate | up [tokens, 2 * intermediate_size] -> act(gate) * up.

    The fused op where there is one for the activation, else in two steps.
    """
    op = gated_op(name)
    if op is not None:
        return config.ops.resolve(op, config.dtype, intermediate_size=intermediate_size)
    if isinstance(name, GatedActivation):
        return _on_halves(name.function)
    act = activation(name)
    return _on_halves(lambda gate, up: act(gate) * up)


def _on_halves(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Activation:
    def apply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return function(gate, up)

    return apply
