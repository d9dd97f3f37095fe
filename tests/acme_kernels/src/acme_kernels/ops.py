"""The kernels: plain torch here, where a real pack has something faster."""

from __future__ import annotations

import torch

from llmfw.ops.costs import Cost


def squared_relu_reference(x):
    """relu(x) ** 2, elementwise."""
    return torch.relu(x).square()


def squared_relu_inputs(context, generator):
    """Calls to check: none, one and many rows."""
    for rows in (0, 1, 33):
        x = torch.randn(rows, 24, generator=generator)
        yield (x.to(context.info.device, context.dtype),)


def squared_relu_cost(context, arguments, results):
    """Read once, written once; a comparison and a product an element."""
    (x,) = arguments
    return Cost(2 * x.nbytes, 2 * x.numel())


def squared_relu(context):
    """The kernel."""

    def run(x):
        return x.clamp_min(0).pow_(2)

    return run


def squared_relu_wrong(context):
    """Not the reference's function."""
    return torch.relu


def rms_norm(context):
    """Called once for each hidden size."""
    width = context["hidden_size"]

    def run(x, weight, eps, offset=0.0):
        return torch.nn.functional.rms_norm(x, (width,), weight + offset, eps)

    return run
