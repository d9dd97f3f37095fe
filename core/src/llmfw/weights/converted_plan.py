"""Planning from a converted checkpoint: each parameter is one tensor of its own name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from llmfw.weights.converted import ConvertedCheckpoint
from llmfw.weights.expressions import Source
from llmfw.weights.packed import FromPacked, sources_of
from llmfw.weights.plan import Fill, FilledSlot, LoadPlan, dtype_text, shape_text
from llmfw.weights.problems import Problem, weight_error
from llmfw.weights.slots import OneRank, Slot, SlotPart, TensorParallel, collect_slots

_HINT = "convert the model again: llmfw convert MODEL OUT"


def plan_converted(
    model: nn.Module,
    checkpoint: ConvertedCheckpoint,
    mapping: TensorParallel | None = None,
    source_plan: LoadPlan | None = None,
) -> LoadPlan:
    """Settles which tensor fills which parameter: the one of its name, or what stays packed.

    Args:
        model: The model; its parameters may be on the meta device.
        checkpoint: The rank's tensors.
        mapping: Tensor-parallel size and rank; None for one rank.
        source_plan: How the source fills the model; needed where tensors stay packed.

    Raises:
        WeightError: Once, listing every parameter and tensor that do not fit.
    """
    mapping = mapping or OneRank()
    wanted = collect_slots(model, mapping)
    ties = {**wanted.ties, **checkpoint.config.ties}
    slots = {slot.path: slot for slot in wanted.slots if slot.path not in ties}
    names = tuple(checkpoint.names())
    packed = _from_packed(checkpoint, source_plan)
    plain = {path: slot for path, slot in slots.items() if path not in packed}
    problems = [*wanted.problems, *_problems(plain, checkpoint)]
    source = f"converted checkpoint {checkpoint.path} ({len(names)} tensors)"
    if problems:
        raise weight_error(problems, source, _HINT)
    dtypes = checkpoint.config.kept_dtypes()
    filled = []
    for name in names:
        slot = slots[name]
        rows = slot.shape[0] if slot.shape else 0
        fill = Fill(SlotPart(name, slot.shape, 0, rows), Source(name, checkpoint.info(name)))
        filled.append(FilledSlot(slot, (fill,), dtypes.get(name)))
    filled += packed.values()
    return LoadPlan(tuple(filled), ties, (), (), source, names, mapping.tp_size)


def _from_packed(
    checkpoint: ConvertedCheckpoint, source_plan: LoadPlan | None
) -> dict[str, FilledSlot]:
    """The parameters that no tensor is named after and the packed ones fill, by path."""
    packed = checkpoint.packed
    if packed is None or source_plan is None:
        return {}
    plain, there = set(checkpoint.names()), set(packed.names())
    found: dict[str, FilledSlot] = {}
    for filled in source_plan.filled:
        names = {source.name for source in sources_of(filled)}
        if filled.slot.path not in plain and names <= there:
            fills = tuple(Fill(fill.part, FromPacked(fill.expr, packed)) for fill in filled.fills)
            found[filled.slot.path] = replace(filled, fills=fills)
    return found


def _problems(slots: dict[str, Slot], checkpoint: ConvertedCheckpoint) -> Iterator[Problem]:
    names = set(checkpoint.names())
    for path, slot in slots.items():
        if path not in names:
            yield Problem("missing", path, f"no tensor of that name; {shape_text(slot.shape)}")
            continue
        info = checkpoint.info(path)
        if info.shape != slot.shape:
            detail = f"the tensor is {shape_text(info.shape)}, the model wants"
            yield Problem("shape", path, f"{detail} {shape_text(slot.shape)}")
        elif info.dtype.is_floating_point != slot.dtype.is_floating_point:
            detail = f"the tensor is {dtype_text(info.dtype)}, the parameter"
            yield Problem("dtype", path, f"{detail} {dtype_text(slot.dtype)}")
    for name in sorted(names - set(slots)):
        yield Problem("surplus", name, "the model has no such parameter")
