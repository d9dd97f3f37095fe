"""Loading: parameters are made one at a time and filled in place."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import nn

from llmfw.errors import UsageError, WeightError
from llmfw.weights.checkpoint import Checkpoint, ReadsInto
from llmfw.weights.device_reader import StagedCheckpoint, pinned_loading
from llmfw.weights.huge_pages import advise_huge_pages
from llmfw.weights.memory_reader import MemoryCheckpoint
from llmfw.weights.plan import FilledSlot, LoadPlan
from llmfw.weights.planning import plan_weights
from llmfw.weights.slots import TensorParallel
from llmfw.weights.weight_map import WeightMap

Progress = Callable[[int, int, str], None]
READERS = 4
LoadDtype = torch.dtype | Literal["declared", "stored"]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Args:
        parameters: Parameters and buffers filled.
        nbytes: Bytes they take.
        ignored: Tensors ignored on purpose.
        seconds: Wall time.
        dtypes: Bytes by dtype name.
    """

    parameters: int
    nbytes: int
    ignored: int
    seconds: float
    dtypes: dict[str, int]


def load_weights(
    model: nn.Module,
    plan: LoadPlan,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: LoadDtype = "declared",
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Makes every parameter on `device`, fills it as planned, then calls the modules' `post_load`.

    Args:
        model: The model that the plan was made for.
        plan: From `plan_weights`.
        checkpoint: The checkpoint that the plan was made for.
        device: Where the parameters go.
        dtype: "declared": each parameter has the dtype its module declares; "stored": the
            checkpoint's own, bit for bit; a torch dtype: all floating-point parameters have it. A
            weight map's dtype rule comes before all.
        threads: Reading threads, each of which fills a parameter at a time; None: one for a CPU,
            `READERS` for a GPU or as many as there are cores.
        progress: Called after each parameter with (bytes done, bytes in all, name), from any
            reading thread but never from two at once.

    Raises:
        CheckpointError: If a tensor cannot be read.
        WeightError: If a buffer that no checkpoint fills is still on the meta device at the end.
    """
    target = torch.device(device)
    threads = default_threads(target) if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads}: loading needs at least one")
    begin = time.perf_counter()
    if target.type == "cuda" and isinstance(checkpoint, ReadsInto) and pinned_loading():
        checkpoint = StagedCheckpoint(checkpoint, target)
    loader = _Loader(model, plan, checkpoint, target, dtype, progress)
    with torch.no_grad():
        if threads == 1:
            for filled in plan.filled:
                loader.load(filled)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="llmfw-load") as pool:
                list(pool.map(loader.load, plan.filled))
        _tie(model, plan)
        _post_load(model)
    _require_nothing_on_meta(model)
    seconds = time.perf_counter() - begin
    return LoadReport(len(plan.filled), loader.done, len(plan.ignored), seconds, loader.dtypes)


def default_threads(device: torch.device) -> int:
    """Reading threads: a few keep a GPU's link busy; a CPU's memory is filled as fast by one."""
    return 1 if device.type == "cpu" else max(1, min(READERS, os.cpu_count() or 1))


def load_into(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    weight_map: WeightMap | None = None,
    *,
    prefix: str = "",
    mapping: TensorParallel | None = None,
    device: torch.device | str | None = None,
    dtype: LoadDtype = "declared",
) -> LoadReport:
    """Plans and loads any module from tensors in memory, for an author's own `load_weights`.

    Args:
        module: A model or a part of one.
        tensors: Name to tensor, e.g. a state dict.
        weight_map: Rules from their names to the module's; None when the names are the module's.
        prefix: Takes only the tensors whose names begin so, without it ("model.layers.0.mlp.").
        mapping: Tensor-parallel size and rank; None for one rank.
        device: Where the parameters go; None: where they are, or the CPU when they are on the meta
            device.
        dtype: As for `load_weights`.

    Raises:
        WeightError: As `plan_weights` does.
    """
    chosen = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    checkpoint = MemoryCheckpoint(chosen)
    plan = plan_weights(module, checkpoint, weight_map, mapping)
    target = _device_of(module) if device is None else device
    return load_weights(module, plan, checkpoint, device=target, dtype=dtype)


class _Loader:
    """One load in progress; `load` may be called from several threads."""

    def __init__(
        self,
        model: nn.Module,
        plan: LoadPlan,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: LoadDtype,
        progress: Progress | None,
    ) -> None:
        self.model, self.checkpoint, self.device, self.dtype = model, checkpoint, device, dtype
        self.progress = progress
        self.total = sum(_nbytes(filled, self._dtype_of(filled)) for filled in plan.filled)
        self.done = 0
        self.dtypes: dict[str, int] = {}
        self._lock = threading.Lock()

    def load(self, filled: FilledSlot) -> None:
        slot = filled.slot
        dtype = self._dtype_of(filled)
        value = read_parameter(filled, self.checkpoint, dtype, self.device)
        _assign(self.model.get_submodule(slot.owner), slot.attribute, value, slot.is_buffer)
        with self._lock:
            self.done += value.nbytes
            name = str(dtype).removeprefix("torch.")
            self.dtypes[name] = self.dtypes.get(name, 0) + value.nbytes
            if self.progress is not None:
                self.progress(self.done, self.total, slot.path)

    def _dtype_of(self, filled: FilledSlot) -> torch.dtype:
        return loaded_dtype(filled, self.dtype)


def loaded_dtype(filled: FilledSlot, dtype: LoadDtype) -> torch.dtype:
    """The dtype that a parameter gets; `dtype` as `load_weights` takes it."""
    if filled.dtype is not None:
        return filled.dtype
    if dtype == "stored":
        return stored_dtype(filled)
    if dtype == "declared" or not filled.slot.dtype.is_floating_point:
        return filled.slot.dtype
    return dtype


def stored_dtype(filled: FilledSlot) -> torch.dtype:
    """The dtype that holds every tensor that fills a parameter."""
    return reduce(torch.promote_types, (fill.expr.dtype for fill in filled.fills))


def read_parameter(
    filled: FilledSlot,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A parameter's value as planned, of the slot's shape."""
    with torch.no_grad():
        value = torch.empty(filled.slot.shape, dtype=dtype, device=device)
        advise_huge_pages(value)
        if filled.slot.zeroed:
            return value.zero_()
        for fill in filled.fills:
            whole = len(filled.fills) == 1
            out = value if whole else value.narrow(0, fill.part.start, fill.part.rows)
            fill.expr.write(out, checkpoint)
        return value


def _nbytes(filled: FilledSlot, dtype: torch.dtype) -> int:
    return torch.Size(filled.slot.shape).numel() * dtype.itemsize


def _assign(module: nn.Module, attribute: str, value: torch.Tensor, is_buffer: bool) -> None:
    if is_buffer:
        module._buffers[attribute] = value
        return
    parameter = nn.Parameter(value, requires_grad=False)
    old = module._parameters[attribute]
    parameter.__dict__.update(old.__dict__ if old is not None else {})
    module._parameters[attribute] = parameter


def _tie(model: nn.Module, plan: LoadPlan) -> None:
    for dst, src in plan.ties.items():
        owner, _, attribute = src.rpartition(".")
        source = model.get_submodule(owner)
        tied_owner, _, tied_attribute = dst.rpartition(".")
        target = model.get_submodule(tied_owner)
        if attribute in source._parameters:
            target._parameters[tied_attribute] = source._parameters[attribute]
        else:
            target._buffers[tied_attribute] = source._buffers[attribute]


def _post_load(model: nn.Module) -> None:
    for module in model.modules():
        hook = getattr(module, "post_load", None)
        if callable(hook):
            hook()


def _require_nothing_on_meta(model: nn.Module) -> None:
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    left += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise WeightError(
            f"still without values after loading: {', '.join(left)}",
            hint="a buffer that no checkpoint holds must be computed in its module's post_load()",
        )


def _device_of(module: nn.Module) -> torch.device:
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))
