# ruff: noqa: D102 - methods of the nodes and rules are documented at their base
"""Lazy tensors: how a parameter is put together from a checkpoint's tensors, and taken apart.

Every node only rearranges elements, so each can be undone: `write` fills a tensor from the
checkpoint, `scatter` takes a tensor of that shape and hands the elements back to the checkpoint's
names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from llmfw.weights.checkpoint import Checkpoint, ReadsInto, TensorInfo


class Sink(Protocol):
    """Where `scatter` puts what it has taken apart."""

    def put(self, expr: Expr, dim: int, start: int, value: torch.Tensor) -> None:
        """Rows of `expr` along `dim` from `start` on; called until all of `expr` is there."""


class Expr:
    """A tensor that is not there yet: a shape, a dtype, and where its elements come from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype as the checkpoint has it."""
        raise NotImplementedError

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its value, a CPU tensor that must not be written to."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.write(out, checkpoint)
        return out

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        """Fills `out` with it (converting to the dtype and device of `out`)."""
        out.copy_(self.read(checkpoint))

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        """The inverse of `write`."""
        raise NotImplementedError

    def sources(self) -> Iterator[Source]:
        """The tensors of the checkpoint it is made of."""
        raise NotImplementedError

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        """The rows [start, stop) of it along `dim`."""
        if start == 0 and stop == self.shape[dim]:
            return self
        return Narrow(self, dim, start, stop)


@dataclass(frozen=True)
class Source(Expr):
    """A tensor of the checkpoint as it is."""

    name: str
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        return checkpoint.tensor(self.name)

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        if isinstance(checkpoint, ReadsInto) and checkpoint.reads_into(self.name, out):
            checkpoint.read_into(self.name, out)
        elif out.dim() > 2:  # a stack of matrices, perhaps to be dequantised: one at a time
            for index in range(out.shape[0]):
                out[index].copy_(checkpoint.slice(self.name, 0, index, index + 1)[0])
        else:
            super().write(out, checkpoint)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        sink.put(self, 0, 0, value)

    def sources(self) -> Iterator[Source]:
        yield self


@dataclass(frozen=True)
class Narrow(Expr):
    """Rows [start, stop) of another along one dimension."""

    of: Expr
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.of.shape
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        if isinstance(self.of, Source):
            return checkpoint.slice(self.of.name, self.dim, self.start, self.stop)
        return self.of.read(checkpoint).narrow(self.dim, self.start, self.stop - self.start)

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        whole = self.of
        if (
            isinstance(whole, Source)
            and self.dim == 0
            and isinstance(checkpoint, ReadsInto)
            and checkpoint.reads_into(whole.name, out)
        ):
            checkpoint.read_into(whole.name, out, self.start)
        else:
            super().write(out, checkpoint)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        sink.put(self.of, self.dim, self.start, value)

    def sources(self) -> Iterator[Source]:
        return self.of.sources()

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        if dim == self.dim:
            return self.of.narrow(dim, self.start + start, self.start + stop)
        return super().narrow(dim, start, stop)


@dataclass(frozen=True)
class Concat(Expr):
    """Several, one after the other along one dimension; equal in all others."""

    parts: tuple[Expr, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        size = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], size, *first[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def _placed(self) -> Iterator[tuple[Expr, int, int]]:
        start = 0
        for part in self.parts:
            yield part, start, part.shape[self.dim]
            start += part.shape[self.dim]

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        for part, start, size in self._placed():
            part.write(out.narrow(self.dim, start, size), checkpoint)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        for part, start, size in self._placed():
            part.scatter(value.narrow(self.dim, start, size), sink)

    def sources(self) -> Iterator[Source]:
        for part in self.parts:
            yield from part.sources()

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        if dim != self.dim:
            return Concat(tuple(part.narrow(dim, start, stop) for part in self.parts), self.dim)
        kept = tuple(
            part.narrow(dim, max(start - at, 0), min(stop - at, size))
            for part, at, size in self._placed()
            if at < stop and start < at + size
        )
        return kept[0] if len(kept) == 1 else Concat(kept, dim)


@dataclass(frozen=True)
class Stack(Expr):
    """Several of one shape along a new first dimension (a layer's experts)."""

    parts: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        for index, part in enumerate(self.parts):
            part.write(out[index], checkpoint)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        for index, part in enumerate(self.parts):
            part.scatter(value[index], sink)

    def sources(self) -> Iterator[Source]:
        for part in self.parts:
            yield from part.sources()

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        if dim == 0:
            return Stack(self.parts[start:stop])
        return Stack(tuple(part.narrow(dim - 1, start, stop) for part in self.parts))


@dataclass(frozen=True)
class Transpose(Expr):
    """The last two dimensions exchanged."""

    of: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.of.shape
        return (*lead, columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        return self.of.read(checkpoint).transpose(-2, -1)

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        self.of.write(out.transpose(-2, -1), checkpoint)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        self.of.scatter(value.transpose(-2, -1), sink)

    def sources(self) -> Iterator[Source]:
        return self.of.sources()

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        last = len(self.of.shape) - 1
        swapped = {last: last - 1, last - 1: last}.get(dim, dim)
        return Transpose(self.of.narrow(swapped, start, stop))


@dataclass(frozen=True)
class Reorder(Expr):
    """One dimension seen as several, those permuted, and merged again; the shape stays."""

    of: Expr
    dim: int
    view: tuple[int, ...]
    permutation: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        return reorder(self.of.read(checkpoint), self.dim, self.view, self.permutation)

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        if self.dim == 0 or out.dim() < 3:
            super().write(out, checkpoint)
            return
        for index in range(out.shape[0]):  # a stack of matrices, one at a time
            row = self.of.narrow(0, index, index + 1).read(checkpoint)
            out[index : index + 1].copy_(reorder(row, self.dim, self.view, self.permutation))

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        view = tuple(self.view[axis] for axis in self.permutation)
        inverse = tuple(self.permutation.index(axis) for axis in range(len(self.permutation)))
        self.of.scatter(reorder(value, self.dim, view, inverse), sink)

    def sources(self) -> Iterator[Source]:
        return self.of.sources()

    def narrow(self, dim: int, start: int, stop: int) -> Expr:
        if dim != self.dim:
            return Reorder(self.of.narrow(dim, start, stop), self.dim, self.view, self.permutation)
        return super().narrow(dim, start, stop)


def reorder(
    tensor: torch.Tensor, dim: int, view: tuple[int, ...], permutation: tuple[int, ...]
) -> torch.Tensor:
    """`tensor` with dimension `dim` split into `view`, those axes permuted, and merged again."""
    axes = (
        *range(dim),
        *(dim + axis for axis in permutation),
        *range(dim + len(view), tensor.dim() - 1 + len(view)),
    )
    split = tensor.reshape(*tensor.shape[:dim], *view, *tensor.shape[dim + 1 :])
    return split.permute(axes).reshape(tensor.shape)


def resolve_view(view: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """`view` with its one -1 worked out so that its product is `size`; None where none is."""
    known = math.prod(axis for axis in view if axis != -1)
    if view.count(-1) == 0:
        return view if known == size else None
    if view.count(-1) > 1 or known <= 0 or size % known:
        return None
    return tuple(size // known if axis == -1 else axis for axis in view)
