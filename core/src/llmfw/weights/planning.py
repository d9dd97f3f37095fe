"""Planning: every tensor and every parameter accounted for, from headers alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

from llmfw.weights.checkpoint import Checkpoint
from llmfw.weights.expressions import Expr, Source
from llmfw.weights.plan import Fill, FilledSlot, LoadPlan, dtype_text, shape_text, stored_as
from llmfw.weights.problems import Nearest, Problem, weight_error
from llmfw.weights.rules import DtypeRule, Ignored, NameTable, TieRule
from llmfw.weights.slots import (
    OneRank,
    Slot,
    SlotPart,
    TensorParallel,
    Wanted,
    collect_slots,
    fused_shape,
)
from llmfw.weights.weight_map import IGNORED_BY_DEFAULT, WeightMap

logger = logging.getLogger("llmfw.weights")

HINT = (
    "rename, split, fuse, tie or ignore them in the plugin's weight map (docs/plugins/weights.md)"
)


def plan_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    weight_map: WeightMap | None = None,
    mapping: TensorParallel | None = None,
) -> LoadPlan:
    """Settles which tensor fills which parameter; reads headers only and changes nothing.

    Args:
        model: Any module; its parameters may be on the meta device. Modules may declare
            `weight_shards` and `parallel`.
        checkpoint: Where the tensors are.
        weight_map: Rules from the checkpoint's names to the model's; None for a checkpoint that has
            them already.
        mapping: Tensor-parallel size and rank; None for one rank.

    Raises:
        WeightError: Once, listing every parameter that nothing fills or two fill, every tensor that
            nothing takes, and every shape or dtype that differs.
    """
    weight_map = weight_map or WeightMap()
    mapping = mapping or OneRank()
    wanted = collect_slots(model, mapping)
    wanted.ties.update(_declared_ties(wanted, weight_map))
    names = tuple(checkpoint.names())
    table = NameTable({name: Source(name, checkpoint.info(name)) for name in names})
    unused = tuple(rule.describe() for rule in weight_map.rules if not rule.apply(table))
    _settle_ties(table, wanted)
    filled = [slot for slot in (_fill(slot, table, weight_map) for slot in _untied(wanted)) if slot]
    for rule in IGNORED_BY_DEFAULT:
        rule.apply(table)
    source = f"{checkpoint.format} checkpoint {checkpoint.path} ({len(names)} tensors)"
    problems = [*wanted.problems, *_explained(table)]
    if problems:
        raise weight_error(problems, source, HINT)
    for rule_text in unused:
        logger.debug("weight map rule met no tensor: %s", rule_text)
    order = {name: index for index, name in enumerate(names)}
    filled.sort(
        key=lambda slot: min(
            (order[s.name] for f in slot.fills for s in f.expr.sources()), default=0
        )
    )
    return LoadPlan(
        tuple(filled), wanted.ties, tuple(table.ignored), unused, source, names, mapping.tp_size
    )


def _declared_ties(wanted: Wanted, weight_map: WeightMap) -> dict[str, str]:
    """Ties that the map's rules name; a rule whose parameters are not there is a problem."""
    paths = {slot.path for slot in wanted.slots}
    ties: dict[str, str] = {}
    for rule in weight_map.rules:
        if not isinstance(rule, TieRule):
            continue
        found = {path: values for path in paths if (values := rule.dst.match(path)) is not None}
        if not found and not any(rule.dst.match(path) is not None for path in wanted.ties):
            wanted.problems.append(
                Problem("missing", rule.dst.text, f"{rule.describe()}: no such parameter")
            )
        for path, values in found.items():
            src = rule.src.fill(values)
            if src in paths and src != path:
                ties[path] = src
            else:
                wanted.problems.append(
                    Problem("missing", src, f"{rule.describe()}: no such parameter")
                )
    return ties


def _settle_ties(table: NameTable, wanted: Wanted) -> None:
    """A tied parameter's tensor is ignored, or serves as the other's where only it is there."""
    for dst, src in wanted.ties.items():
        if dst not in table.tensors:
            continue
        expr = table.tensors.pop(dst)
        if src in table.tensors:
            table.ignored.append(Ignored(dst, "tied", expr))
        else:
            table.tensors[src] = expr


def _untied(wanted: Wanted) -> Iterator[Slot]:
    return (slot for slot in wanted.slots if slot.path not in wanted.ties)


def _fill(slot: Slot, table: NameTable, weight_map: WeightMap) -> FilledSlot | None:
    """Takes what fills the slot out of the table; None, and problems noted, if incomplete."""
    parts = [(part, _take(slot, part, table)) for part in _parts_present(slot, table)]
    fills = tuple(
        Fill(
            part,
            expr if part.cut is None else expr.narrow(part.cut.dim, part.cut.start, part.cut.stop),
        )
        for part, expr in parts
        if expr is not None
    )
    if len(fills) < len(slot.parts):
        return None
    return FilledSlot(slot, fills, _ruled_dtype(slot, weight_map))


def _parts_present(slot: Slot, table: NameTable) -> tuple[SlotPart, ...]:
    """The slot's parts; a tensor that has them fused under the parameter's name is cut first."""
    fused = table.tensors.get(slot.path)
    if len(slot.parts) == 1 or fused is None:
        return slot.parts
    present = [part.name for part in slot.parts if part.name in table.tensors]
    if present:
        detail = f"there is this tensor and its parts {', '.join(present)}"
        table.problems.append(Problem("duplicate", slot.path, detail))
        for name in present:
            del table.tensors[name]
    del table.tensors[slot.path]
    shape = fused_shape(slot)
    if fused.shape != shape:
        table.problems.append(_shape_problem(slot.path, fused, shape))
        return ()
    start = 0
    for part in slot.parts:
        table.tensors[part.name] = fused.narrow(0, start, start + part.shape[0])
        start += part.shape[0]
    return slot.parts


def _take(slot: Slot, part: SlotPart, table: NameTable) -> Expr | None:
    expr = table.tensors.pop(part.name, None)
    if expr is None:
        detail = f"no tensor fills it; it wants {shape_text(part.shape)}"
        if part.name != slot.path and len(slot.parts) > 1:
            detail += f" (part of {slot.path})"
        table.problems.append(Problem("missing", part.name, detail))
    elif expr.shape != part.shape:
        table.problems.append(_shape_problem(part.name, expr, part.shape))
    elif not _dtype_fits(expr.dtype, slot.dtype):
        detail = f"the tensor is {dtype_text(expr.dtype)}, the parameter {dtype_text(slot.dtype)}"
        table.problems.append(Problem("dtype", part.name, detail))
    else:
        return expr
    return None


def _shape_problem(name: str, expr: Expr, wanted: tuple[int, ...]) -> Problem:
    found = f"{shape_text(expr.shape)}{_origin(name, expr)}"
    detail = f"the tensor is {found}, the model wants {shape_text(wanted)}"
    return Problem("shape", name, detail)


def _dtype_fits(stored: torch.dtype, declared: torch.dtype) -> bool:
    """Floating point converts to floating point; integers and booleans never convert.

    Nor do floats of a byte: they mean something only with their scales.
    """
    if stored == declared:
        return True
    return stored.is_floating_point and declared.is_floating_point and stored.itemsize > 1


def _ruled_dtype(slot: Slot, weight_map: WeightMap) -> torch.dtype | None:
    names = {slot.path, *(part.name for part in slot.parts)}
    asked = [
        rule.dtype
        for rule in weight_map.rules
        if isinstance(rule, DtypeRule)
        and any(rule.pattern.match(name) is not None for name in names)
    ]
    return asked[-1] if asked else None


def _explained(table: NameTable) -> list[Problem]:
    """The table's problems and what is left in it, with the nearest names opposite."""
    missing = [problem.name for problem in table.problems if problem.kind == "missing"]
    near_tensor, near_parameter = Nearest(list(table.tensors)), Nearest(missing)
    problems = [
        Problem(p.kind, p.name, p.detail + near_tensor.to(p.name)) if p.kind == "missing" else p
        for p in table.problems
    ]
    for name, expr in table.tensors.items():
        _, file = stored_as(expr)
        place = f" in {file}" if file else ""
        detail = f"nothing takes this tensor {shape_text(expr.shape)}{_origin(name, expr)}{place}"
        problems.append(Problem("surplus", name, detail + near_parameter.to(name)))
    return problems


def _origin(name: str, expr: Expr) -> str:
    """ " (from a, b)" where the map has made the tensor from others or renamed it."""
    names = [source.name for source in expr.sources()]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return "" if names == [name] else f" (from {shown})"
