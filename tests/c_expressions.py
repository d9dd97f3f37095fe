"""The value of an activation's C expression, by Python: what `GatedActivation.code` means."""

from __future__ import annotations

import math
import re

FUNCTIONS = {
    "fminf": min,
    "fmaxf": max,
    "expf": math.exp,
    "tanhf": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}
VALUES = [(gate, up) for gate in (-9.0, -1.5, 0.0, 0.25, 8.0) for up in (-8.5, -0.5, 2.0, 7.5)]


def value_of(code: str, gate: float, up: float) -> float:
    """The expression for one gate and one up; its numbers end with f."""
    python = re.sub(r"(\d\.?\d*(?:e-?\d+)?)f\b", r"\1", code)
    return eval(python, {"__builtins__": {}}, {**FUNCTIONS, "gate": gate, "up": up})
