"""What of a converted checkpoint stays packed: tensors as the source has them, in a file apart.

They are dequantised when they are read, by the reader that reads the source, and put together as
the source's plan of loading says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from llmfw.weights.checkpoint import Checkpoint
from llmfw.weights.expressions import Expr, Sink, Source
from llmfw.weights.plan import FilledSlot, LoadPlan

PACKED = "packed.safetensors"


@dataclass(frozen=True)
class FromPacked(Expr):
    """A lazy tensor that is read from the packed tensors, whatever checkpoint the others are in.

    Args:
        of: The tensor, as the source's plan has it.
        packed: The reader of the packed tensors.
    """

    of: Expr
    packed: Checkpoint

    @property
    def shape(self) -> tuple[int, ...]:
        """As the source's plan has it."""
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        """As it is dequantised."""
        return self.of.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its value, dequantised."""
        return self.of.read(self.packed)

    def write(self, out: torch.Tensor, checkpoint: Checkpoint) -> None:
        """Fills `out` with it."""
        self.of.write(out, self.packed)

    def scatter(self, value: torch.Tensor, sink: Sink) -> None:
        """Takes it apart into the source's tensors, as they are when dequantised."""
        self.of.scatter(value, sink)

    def sources(self) -> Iterator[Source]:
        """The source's tensors that it is made of, where they are now."""
        for source in self.of.sources():
            yield Source(source.name, self.packed.info(source.name))


def kept_packed(plans: Sequence[LoadPlan], keep_ignored: bool = True) -> frozenset[str]:
    """Which tensors of a source stay as they are: the packed ones, and what is mixed with them.

    A parameter is either made of kept tensors alone, or of none.

    Args:
        plans: Each rank's plan of loading from the source.
        keep_ignored: Whether packed tensors that no parameter takes stay too.
    """
    wholes = [tuple(sources_of(filled)) for plan in plans for filled in plan.filled]
    if keep_ignored:
        wholes += [tuple(each.expr.sources()) for plan in plans for each in plan.ignored]
    kept = {source.name for whole in wholes for source in whole if source.info.is_packed}
    groups = [{source.name for source in whole} for whole in wholes]
    grown = True
    while grown:
        before = len(kept)
        kept.update(*(group for group in groups if group & kept))
        grown = len(kept) > before
    return frozenset(kept)


def stays(sources: Iterable[Source], kept: frozenset[str]) -> bool:
    """Whether what is made of these tensors stays packed."""
    return any(source.name in kept for source in sources)


def sources_of(filled: FilledSlot) -> Iterator[Source]:
    """The checkpoint's tensors that fill a parameter."""
    for fill in filled.fills:
        yield from fill.expr.sources()
