"""Inputs for checking the kernels of dense products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmfw.ops.drawn import Case, OpInputs, normal, shapes, unaligned
from llmfw.ops.kernel import OpContext


def _linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    width, outs = context["in_features"], context["out_features"]
    weight = normal(context, generator, outs, width)
    bias = normal(context, generator, outs) if context["bias"] else None
    for tokens in (0, 1, 2, 3, 4, 5, 7, 16, 33, 1030):
        yield Case(f"tokens={tokens}", (normal(context, generator, tokens, width), weight, bias))
    x = unaligned(normal(context, generator, 2, width))
    yield Case("tokens=2 unaligned", (x, weight, bias))


def _float32_linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    for case in _linear(context, generator):
        x, weight, bias = case.arguments
        assert isinstance(weight, torch.Tensor)
        wide = bias.float() / 3 if isinstance(bias, torch.Tensor) else None
        yield Case(case.label, (x, weight.float() / 3, wide))


def _gated_linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    width, outs = context["in_features"], 2 * context["intermediate_size"]
    weight = normal(context, generator, outs, width)
    bias = normal(context, generator, outs) if context["bias"] else None
    for tokens in (0, 1, 2, 3, 4, 5, 33, 1030):
        yield Case(f"tokens={tokens}", (normal(context, generator, tokens, width), weight, bias))
    x = unaligned(normal(context, generator, 2, width))
    yield Case("tokens=2 unaligned", (x, weight, bias))


def _head_linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    heads, width, outs = context["num_heads"], context["in_features"], context["out_features"]
    for tokens in (0, 1, 2, 7, 33):
        x = normal(context, generator, tokens, heads, width + 8)[..., :width]
        rows = normal(context, generator, heads, 5 + outs, width)[:, 5:]
        yield Case(f"tokens={tokens}", (x, rows))
        columns = normal(context, generator, heads, 5 + width, outs)[:, 5:]
        yield Case(f"tokens={tokens} transposed", (x, columns.transpose(1, 2)))
        out = normal(context, generator, tokens, heads, outs + 8)[..., :outs]
        yield Case(f"tokens={tokens} into a view", (x, rows, out), written=(2,))


PRODUCT_INPUTS: dict[str, OpInputs] = {
    "linear": OpInputs(
        shapes("in_features out_features bias", (1, 1, 1), (33, 5, 0), (64, 96, 0), (577, 131, 1)),
        _linear,
    ),
    "float32_linear": OpInputs(
        shapes(
            "in_features out_features bias", (1, 1, 1), (33, 5, 0), (256, 64, 0), (2120, 131, 1)
        ),
        _float32_linear,
    ),
    "gated_linear": OpInputs(
        shapes("in_features intermediate_size bias", (1, 1, 1), (33, 5, 0), (64, 96, 0)),
        _gated_linear,
    ),
    "head_linear": OpInputs(
        shapes("num_heads in_features out_features", (1, 1, 1), (5, 33, 7), (16, 128, 512)),
        _head_linear,
    ),
}
