"""Which of the reference's modules corresponds to which of ours, found through the weights.

A module of ours is filled from tensors of the checkpoint; the reference's modules have the same
tensors. Fused modules correspond by rows: the weight map says which output of theirs each is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llmfw.layers import Attention, Embedding
from llmfw.weights import Checkpoint, LoadPlan, TensorInfo, WeightMap, plan_weights
from llmfw.weights.expressions import Expr, Source


@dataclass(frozen=True)
class Pair:
    """A stage of one of our modules and what equals it in the reference.

    Args:
        ours, theirs: Module paths.
        stage: As in `llmfw.testing.trace`.
        part: Name of the checkpoint's layer where ours fuses several, e.g. "q_proj".
        columns: The features of ours that are compared; None: all.
        theirs_columns: The features of theirs, in our order; None: all.
    """

    ours: str
    theirs: str
    stage: str
    part: str = ""
    columns: slice | None = None
    theirs_columns: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Our path, the part named by its own name: "...self_attn.qkv_proj (q_proj)"."""
        return f"{self.ours} ({self.part})" if self.part else self.ours


@dataclass(frozen=True)
class Correspondence:
    """All pairs, by our path and stage, and the paths of our decoder layers in order."""

    pairs: Mapping[tuple[str, str], tuple[Pair, ...]]
    layers: tuple[str, ...]


def correspond(
    model: nn.Module,
    reference: nn.Module,
    checkpoint: Checkpoint,
    weight_map: WeightMap | None,
) -> Correspondence:
    """Find the pairs.

    Args:
        model: Ours, as built; parameters on the meta device will do.
        reference: The other one.
        checkpoint: What ours is loaded from; only its headers are read.
        weight_map: The plugin's.
    """
    plan = plan_weights(model, _Wide(checkpoint), weight_map, None)
    found: list[Pair] = []
    tensors = _tensors_below(plan, model)
    their_names = _Paths(reference)
    taken = {name for names in tensors.values() for name in names}
    their_tensors = their_names.tensors_below(sorted(taken))
    for filled in plan.filled:
        if filled.slot.attribute != "weight" or filled.slot.is_buffer:
            continue
        owner = filled.slot.owner
        fused = len(filled.fills) > 1
        is_matrix = len(filled.slot.shape) == 2
        is_linear = is_matrix and not isinstance(model.get_submodule(owner), Embedding)
        for fill in filled.fills:
            sources = {source.name for source in fill.expr.sources()}
            theirs = their_names.module_of(next(iter(sources))) if len(sources) == 1 else None
            if theirs is None or len(filled.slot.shape) > 2:
                continue
            part = fill.part.name.split(".")[-2] if fused else ""
            columns = slice(fill.part.start, fill.part.start + fill.part.rows) if fused else None
            rows = _rows(fill.expr) if is_linear else None
            found.append(Pair(owner, theirs, "output", part, columns, rows))
            if not isinstance(model.get_submodule(owner), Embedding):
                found.append(Pair(owner, theirs, "input", part))
    leaves = {pair.ours for pair in found}
    for path, module in model.named_modules():
        if path in leaves or path not in tensors:
            continue
        matched = their_tensors.get(tensors[path])
        if matched is None:
            continue
        stages = ["input", "output"]
        if isinstance(module, Attention):
            stages += ["q", "k", "v", "context"]
        found += [Pair(path, matched, stage) for stage in stages]
    head = getattr(reference, "get_output_embeddings", lambda: None)()
    our_head = next((path for path in plan.ties if path.endswith("weight")), None)
    if head is not None and our_head is not None:
        owner = our_head.rpartition(".")[0]
        path = their_names.path_of(head)
        found += [Pair(owner, path, each) for each in ("input", "output")]
    found.append(Pair("", "", "output"))  # the logits
    pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in found:
        pairs[pair.ours, pair.stage].append(pair)
    layers = tuple(layer_paths(model))
    return Correspondence({key: tuple(each) for key, each in pairs.items()}, layers)


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the decoder layers: the children of the outermost module lists, in order."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{each}.") for each in lists)]
    return [
        f"{path}.{name}" for path in outer for name, _ in model.get_submodule(path).named_children()
    ]


def _tensors_below(plan: LoadPlan, model: nn.Module) -> dict[str, frozenset[str]]:
    """The checkpoint's tensors that fill each of our modules and all below it."""
    below: dict[str, set[str]] = defaultdict(set)
    for filled in plan.filled:
        names = {source.name for fill in filled.fills for source in fill.expr.sources()}
        for path in _ancestors(filled.slot.owner):
            below[path] |= names
    return {path: frozenset(names) for path, names in below.items() if path}


def _ancestors(path: str) -> Iterable[str]:
    """The path itself and all above it, the root as ""."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


class _Paths:
    """The reference's modules, by the names that tensors of the checkpoint have."""

    def __init__(self, reference: nn.Module) -> None:
        self._modules = dict(reference.named_modules())
        prefix = str(getattr(reference, "base_model_prefix", ""))
        self._prefix = f"{prefix}." if prefix else ""
        self._by_id: dict[int, str] = {id(each): path for path, each in self._modules.items()}

    def path_of(self, module: nn.Module) -> str:
        """A module's path."""
        return self._by_id.get(id(module), "")

    def module_of(self, tensor: str) -> str | None:
        """The path of the module that holds a tensor, if it is there under that name."""
        path = tensor.rpartition(".")[0]
        return next((p for p in (path, self._prefix + path) if p in self._modules), None)

    def tensors_below(self, names: Sequence[str]) -> dict[frozenset[str], str]:
        """The deepest module that holds exactly a set of tensors, by that set.

        Tensors whose module has another name here than in the checkpoint (transformers renames
        some while loading) belong to the one child of their nearest ancestor that has no other.
        """
        below: dict[str, set[str]] = defaultdict(set)
        homeless: dict[str, set[str]] = defaultdict(set)
        for name in names:
            path = self.module_of(name)
            if path is not None:
                for each in _ancestors(path):
                    below[each].add(name)
            else:
                homeless[self._nearest(name)].add(name)
        for parent, tensors in homeless.items():
            free = [
                path
                for path, module in self._modules.items()
                if path.rpartition(".")[0] == parent
                and not below.get(path)
                and next(module.parameters(), None) is not None
            ]
            for path in [*free[:1], *_ancestors(parent)] if len(free) == 1 else _ancestors(parent):
                below[path] |= tensors
        deepest: dict[frozenset[str], str] = {}
        for path in sorted(below, key=lambda path: path.count(".")):
            if path:
                deepest[frozenset(below[path])] = path
        return deepest

    def _nearest(self, tensor: str) -> str:
        paths = [path for path in _ancestors(tensor) if path]
        both = [each for path in paths for each in (path, f"{self._prefix}{path}")]
        return next((path for path in both if path in self._modules), "")


def _rows(expr: Expr) -> tuple[int, ...] | None:
    """Which output of the tensor's layer each row of `expr` is; None for all in order."""
    if isinstance(expr, Source):
        return None
    shape = next(expr.sources()).shape
    if len(shape) != 2 or len(expr.shape) != 2 or expr.shape[1] < 2:
        return None
    sample = expr.narrow(1, 0, 2)
    for axis in (0, 1):
        view = [1, 1]
        view[axis] = shape[axis]
        numbers = torch.arange(shape[axis], dtype=torch.float64).view(view).expand(shape)
        read = torch.empty(sample.shape, dtype=torch.float64)
        sample.write(read, _Numbers(numbers))
        if torch.equal(read[:, 0], read[:, 1]):
            return tuple(int(number) for number in read[:, 0].tolist())
    return None


class _Numbers:
    """A checkpoint whose every tensor is the same table of numbers."""

    format = "memory"
    path = Path("<numbers>")

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers

    def names(self) -> Sequence[str]:
        """None are listed."""
        return ()

    def info(self, name: str) -> TensorInfo:
        """The table's header."""
        return TensorInfo(tuple(self._numbers.shape), self._numbers.dtype, "", 0)

    def tensor(self, name: str) -> torch.Tensor:
        """The table."""
        return self._numbers

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """A part of the table."""
        return self._numbers.narrow(dim, start, stop - start)


class _Wide:
    """A checkpoint's headers with every float as float64, which holds row numbers exactly."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.format = checkpoint.format
        self.path = checkpoint.path

    def names(self) -> Sequence[str]:
        """All names."""
        return self._checkpoint.names()

    def info(self, name: str) -> TensorInfo:
        """The header, a float as float64."""
        info = self._checkpoint.info(name)
        return replace(info, dtype=torch.float64) if info.dtype.is_floating_point else info

    def tensor(self, name: str) -> torch.Tensor:
        """Not read."""
        return self._checkpoint.tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Not read."""
        return self._checkpoint.slice(name, dim, start, stop)
