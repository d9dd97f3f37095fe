"""The inverse of loading: parts of a checkpoint's tensors are put together until each is whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.errors import WeightError
from llmfw.weights.expressions import Expr, Source

OnWhole = Callable[[Source, torch.Tensor], None]


class Gather:
    """A sink for `Expr.scatter`.

    Args:
        on_whole: Called once with each tensor of the checkpoint, as soon as all of it is there.
    """

    def __init__(self, on_whole: OnWhole) -> None:
        self._on_whole = on_whole
        self._partial: dict[Expr, tuple[torch.Tensor, set[tuple[int, int]]]] = {}

    def put(self, expr: Expr, dim: int, start: int, value: torch.Tensor) -> None:
        """Rows of `expr` along `dim` from `start` on; rows that came before may come again."""
        if tuple(value.shape) == expr.shape:
            self._finish(expr, value)
            return
        if expr not in self._partial:
            self._partial[expr] = (torch.empty(expr.shape, dtype=value.dtype), set())
        buffer, filled = self._partial[expr]
        if buffer.dtype != value.dtype:
            names = ", ".join(source.name for source in expr.sources())
            raise WeightError(
                f"{names}: its parts are loaded as {buffer.dtype} and as {value.dtype}"
            )
        size = value.shape[dim]
        buffer.narrow(dim, start, size).copy_(value)
        filled.add((start, size))
        if sum(size for _, size in filled) == expr.shape[dim]:
            del self._partial[expr]
            self._finish(expr, buffer)

    def _finish(self, expr: Expr, value: torch.Tensor) -> None:
        if isinstance(expr, Source):
            self._on_whole(expr, value)
        else:
            expr.scatter(value, self)

    def incomplete(self) -> list[str]:
        """Tensors of which only a part was put."""
        return sorted({source.name for expr in self._partial for source in expr.sources()})
