"""What inputs for checking a kernel are made of: a call, the calls of an op, normal values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from llmfw.ops.kernel import OpContext

Shape = Mapping[str, int]
Arguments = tuple[object, ...]


@dataclass(frozen=True)
class Case:
    """One call to check.

    Args:
        label: What is special about it, e.g. "tokens=7".
        arguments: Positional arguments, as the reference takes them.
        written: Indices of the arguments that the op writes to; they are compared as well.
    """

    label: str
    arguments: Arguments
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpInputs:
    """Static shapes to try for an op, and the calls to check for each of them.

    Args:
        shapes: Static shapes.
        draw: Draws the calls.
        codes: For `OpContext.code`.
        compared: What counts of (arguments after a call, its result), where kernels may give the
            same in several ways; the result itself when left out.
    """

    shapes: tuple[Shape, ...]
    draw: Callable[[OpContext, torch.Generator], Iterator[Case]]
    codes: tuple[str, ...] = ("",)
    compared: Callable[[Arguments, object], object] | None = None


def normal(context: OpContext, generator: torch.Generator, *size: int) -> torch.Tensor:
    """Normal values of the context's dtype, drawn on the CPU so that they are equal everywhere."""
    values = torch.randn(size, generator=generator)
    return values.to(context.info.device, context.dtype)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values one element behind the start of their memory."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)


def shapes(names: str, *rows: tuple[int, ...]) -> tuple[Shape, ...]:
    """Static shapes from the names of their facts and rows of values."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)
