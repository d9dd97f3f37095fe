"""What a model wants: parameters and persistent buffers, shards and ranks unfolded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from llmfw.errors import UsageError
from llmfw.weights.problems import Problem
from llmfw.weights.shards import Shard, total_rows


class TensorParallel(Protocol):
    """The part of `llmfw.config.Mapping` that loading asks for."""

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""

    @property
    def tp_rank(self) -> int:
        """This process's rank among them."""


@dataclass(frozen=True)
class OneRank:
    """No tensor parallelism."""

    tp_size: int = 1
    tp_rank: int = 0


@dataclass(frozen=True)
class Cut:
    """A rank's slice of a whole tensor: [start, stop) along `dim`."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class SlotPart:
    """Rows of a parameter that come from one logical tensor.

    Args:
        name: The tensor's logical name.
        shape: The shape it must have, before any tensor-parallel cut.
        start: First row in the parameter.
        rows: Number of rows in the parameter (ignored when the part is the whole parameter).
        cut: The slice of the tensor that this rank takes; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    rows: int
    cut: Cut | None = None


@dataclass(frozen=True)
class Slot:
    """One parameter or persistent buffer to fill.

    Args:
        path: Its name in the module tree.
        owner: Path of its module ("" for the root).
        attribute: Its name in that module.
        is_buffer: Whether it is a buffer.
        shape: Its shape on this rank.
        dtype: The dtype its module declares.
        parts: Where its rows come from; together they cover it.
        zeroed: This rank fills it with zeros instead (a row-parallel bias is added on rank 0 only).
    """

    path: str
    owner: str
    attribute: str
    is_buffer: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[SlotPart, ...]
    zeroed: bool = False


@dataclass
class Wanted:
    """All that a model wants filled, and which of its parameters are one and the same object."""

    slots: list[Slot]
    ties: dict[str, str]
    problems: list[Problem]


def collect_slots(model: nn.Module, mapping: TensorParallel) -> Wanted:
    """Walks the model; a parameter object met a second time is a tie to the first."""
    wanted = Wanted([], {}, [])
    first_path: dict[int, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor, is_buffer in _own_tensors(module):
            path = f"{owner}.{attribute}" if owner else attribute
            if id(tensor) in first_path:
                wanted.ties[path] = first_path[id(tensor)]
                continue
            first_path[id(tensor)] = path
            try:
                parts = tuple(_parts(owner, attribute, tensor, module, mapping))
            except UsageError as exc:
                wanted.problems.append(Problem("parallel", path, exc.message))
                continue
            zeroed = _is_row_bias(module, tensor) and mapping.tp_rank > 0
            shape = tuple(tensor.shape)
            slot = Slot(path, owner, attribute, is_buffer, shape, tensor.dtype, parts, zeroed)
            wanted.slots.append(slot)
    return wanted


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, True


def _parts(
    owner: str, attribute: str, tensor: torch.Tensor, module: nn.Module, mapping: TensorParallel
) -> Iterator[SlotPart]:
    shape = tuple(tensor.shape)
    parallel = getattr(module, "parallel", None) if mapping.tp_size > 1 else None
    size, rank = (mapping.tp_size, mapping.tp_rank) if parallel == "column" else (1, 0)
    shards: tuple[Shard, ...] = tuple(getattr(module, "weight_shards", ()))
    own_name = owner.rpartition(".")[2]
    whole_rows = shape[0] * size if shape else 0
    local_rows = sum(stop - start for start, stop in (shard.rows(size, rank) for shard in shards))
    if not shards or not shape or local_rows != shape[0]:
        shards = (Shard(own_name, whole_rows),)
    parent = owner.rpartition(".")[0]
    at = 0
    for shard in shards:
        name = ".".join(part for part in (parent, shard.name, attribute) if part)
        if not shape:
            yield SlotPart(name, shape, 0, 0)
            return
        start, stop = shard.rows(size, rank)
        cut = Cut(0, start, stop) if size > 1 else None
        whole = (shard.dim0, *shape[1:])
        if parallel == "row" and len(shape) > 1:
            whole = (shard.dim0, shape[1] * mapping.tp_size, *shape[2:])
            cut = Cut(1, mapping.tp_rank * shape[1], (mapping.tp_rank + 1) * shape[1])
        yield SlotPart(name, whole, at, stop - start, cut)
        at += stop - start


def _is_row_bias(module: nn.Module, tensor: torch.Tensor) -> bool:
    return getattr(module, "parallel", None) == "row" and tensor.dim() == 1


def fused_shape(slot: Slot) -> tuple[int, ...]:
    """The shape of a tensor that holds all parts of the slot, before a tensor-parallel cut."""
    if not slot.shape:
        return slot.shape
    rows = total_rows(Shard(part.name, part.shape[0]) for part in slot.parts)
    return (rows, *slot.parts[0].shape[1:])
