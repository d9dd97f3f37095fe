"""Inputs for checking the products that share an RMS norm between them, and what is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from llmfw.ops.drawn import Arguments, Case, OpInputs, normal, shapes, unaligned
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference_normed import row_squares

ROWS = (0, 1, 2, 3, 4, 5, 8, 17, 33, 64, 300)


def _add_linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    width, outs = context["in_features"], context["out_features"]
    weight = normal(context, generator, outs, width) / width**0.5
    norm_weight = normal(context, generator, outs)
    for tokens in ROWS:
        for offset in (0.0, 1.0):
            x, residual = (normal(context, generator, tokens, size) for size in (width, outs))
            arguments = (x, weight, residual, norm_weight, offset)
            yield Case(f"tokens={tokens} offset={offset}", arguments, written=(2,))
    x, residual = (normal(context, generator, 2, size) for size in (width, outs))
    yield Case("unaligned", (unaligned(x), weight, residual, norm_weight), written=(2,))
    yield Case("residual unaligned", (x, weight, unaligned(residual), norm_weight), written=(2,))


def _normed(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    width, outs = context["in_features"], context.shape.get("out_features")
    outs = 2 * context["intermediate_size"] if outs is None else outs
    weight = normal(context, generator, outs, width) / width**0.5
    bias = normal(context, generator, outs) if context["bias"] else None
    for tokens in ROWS:
        x, residual = (normal(context, generator, tokens, width) for _ in range(2))
        squares = residual.float().square()
        fives = torch.stack([squares[:, i::5].sum(-1) for i in range(5)], dim=-1)
        for parts in (None, fives, squares.sum(-1, keepdim=True)):
            label = f"tokens={tokens} parts={0 if parts is None else parts.shape[1]}"
            yield Case(label, (x, residual, parts, weight, bias, 1e-5))
    x, residual = (normal(context, generator, 2, width) for _ in range(2))
    yield Case("unaligned", (unaligned(x), residual, None, weight, bias))
    yield Case("residual unaligned", (x, unaligned(residual), None, weight, bias))


def compared(arguments: Arguments, result: object) -> tuple[torch.Tensor, ...]:
    """Of add_linear: the scaled residual, and the squares' sum however they are given."""
    scaled, squares = cast("tuple[torch.Tensor, torch.Tensor | None]", result)
    return scaled, row_squares(cast("torch.Tensor", arguments[2]), squares)


NORMED_INPUTS: dict[str, OpInputs] = {
    "add_linear": OpInputs(
        shapes("in_features out_features", (1, 1), (33, 5), (64, 96), (576, 200)),
        _add_linear,
        compared=compared,
    ),
    "normed_linear": OpInputs(
        shapes("in_features out_features bias", (1, 1, 1), (33, 5, 0), (64, 96, 0), (576, 200, 1)),
        _normed,
    ),
    "normed_gated_linear": OpInputs(
        shapes("in_features intermediate_size bias", (1, 1, 1), (33, 5, 0), (64, 96, 1)), _normed
    ),
}
