"""The load plan: which tensor fills which parameter, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmfw.weights.expressions import Expr, Source
from llmfw.weights.rules import Ignored
from llmfw.weights.slots import Slot, SlotPart


@dataclass(frozen=True)
class Fill:
    """One part of a parameter and the lazy tensor that goes there.

    Args:
        part: Where it goes.
        expr: What goes there, cut to this rank.
    """

    part: SlotPart
    expr: Expr


@dataclass(frozen=True)
class FilledSlot:
    """A parameter with all that fills it, and the dtype that a rule of the map asks for."""

    slot: Slot
    fills: tuple[Fill, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan as `llmfw inspect --weights` shows it."""

    parameter: str
    shape: str
    tensor: str
    stored: str
    file: str
    note: str


@dataclass(frozen=True)
class LoadPlan:
    """Every parameter with what fills it, every other tensor with the reason why it is ignored.

    Args:
        filled: The parameters, in the order of the checkpoint's files.
        ties: Parameters that are the same object as another: path to the other's path.
        ignored: Tensors that nothing takes, on purpose.
        unused_rules: Rules of the weight map that met no tensor.
        source: The checkpoint, in words.
        tensor_names: All names of the checkpoint, in its order.
        tp_size: Tensor-parallel ranks it was made for.
    """

    filled: tuple[FilledSlot, ...]
    ties: dict[str, str]
    ignored: tuple[Ignored, ...]
    unused_rules: tuple[str, ...]
    source: str
    tensor_names: tuple[str, ...]
    tp_size: int

    def rows(self) -> Iterator[PlanRow]:
        """The plan as rows: first the parameters, then ties, then what is ignored."""
        for filled in self.filled:
            for fill in filled.fills:
                yield _row(filled, fill)
        for dst, src in self.ties.items():
            yield PlanRow(dst, "", "", "", "", f"tied to {src}")
        for ignored in self.ignored:
            stored, file = stored_as(ignored.expr)
            shape = shape_text(ignored.expr.shape)
            yield PlanRow("", shape, ignored.name, stored, file, f"ignored: {ignored.reason}")

    def render(self) -> str:
        """The rows as an aligned table, with a line of totals."""
        heads = ("parameter", "shape", "tensor", "stored", "file", "note")
        table = [
            heads,
            *((r.parameter, r.shape, r.tensor, r.stored, r.file, r.note) for r in self.rows()),
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        total = (
            f"{len(self.filled)} parameters, {len(self.ties)} tied, "
            f"{len(self.ignored)} tensors ignored"
        )
        return "\n".join([*lines, f"{total}; {self.source}"])


def _row(filled: FilledSlot, fill: Fill) -> PlanRow:
    names = [source.name for source in fill.expr.sources()]
    tensor = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
    stored, file = stored_as(fill.expr)
    notes = []
    if len(filled.fills) > 1:
        notes.append(f"rows {fill.part.start}:{fill.part.start + fill.part.rows}")
    if fill.part.cut is not None:
        notes.append(
            f"cut {fill.part.cut.start}:{fill.part.cut.stop} of dimension {fill.part.cut.dim}"
        )
    if filled.slot.zeroed:
        notes.append("zero on this rank")
    if not isinstance(fill.expr, Source):
        notes.append(type(fill.expr).__name__.lower())
    if filled.dtype is not None:
        notes.append(f"as {dtype_text(filled.dtype)}")
    return PlanRow(
        filled.slot.path, shape_text(fill.expr.shape), tensor, stored, file, ", ".join(notes)
    )


def stored_as(expr: Expr) -> tuple[str, str]:
    """How the tensors of `expr` are stored, and in which file (the first of several)."""
    infos = [source.info for source in expr.sources()]
    stored = dict.fromkeys(info.stored or dtype_text(info.dtype) for info in infos)
    return "+".join(stored), infos[0].file


def shape_text(shape: tuple[int, ...]) -> str:
    """ "[2, 3]"."""
    return "[" + ", ".join(map(str, shape)) + "]"


def dtype_text(dtype: torch.dtype) -> str:
    """The dtype without "torch."."""
    return str(dtype).removeprefix("torch.")
