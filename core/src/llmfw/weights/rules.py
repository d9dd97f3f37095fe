# ruff: noqa: D102 - methods of the nodes and rules are documented at their base
"""The rules of a weight map: each takes named lazy tensors and gives back others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from llmfw.errors import UsageError
from llmfw.weights.expressions import Concat, Expr, Reorder, Stack, Transpose, resolve_view
from llmfw.weights.patterns import Pattern, require_same_fields
from llmfw.weights.problems import Problem


@dataclass(frozen=True)
class Ignored:
    """A tensor that nothing takes, on purpose."""

    name: str
    reason: str
    expr: Expr


@dataclass
class NameTable:
    """The tensors at one point of a map, and what the rules have noted on the way."""

    tensors: dict[str, Expr]
    ignored: list[Ignored] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def matches(self, pattern: Pattern) -> list[tuple[str, dict[str, str]]]:
        """All names that match, with what the placeholders stand for."""
        if not pattern.fields:
            return [(pattern.text, {})] if pattern.text in self.tensors else []
        found = ((name, pattern.match(name)) for name in self.tensors)
        return [(name, values) for name, values in found if values is not None]

    def put(self, name: str, expr: Expr, rule: str) -> None:
        """Adds a tensor; a name that is taken is a problem of the rule."""
        if name in self.tensors:
            self.problems.append(
                Problem("duplicate", name, f"{rule} makes it, but it is already there")
            )
        else:
            self.tensors[name] = expr


class Rule(Protocol):
    """One line of a weight map."""

    def apply(self, table: NameTable) -> bool:
        """Changes the table; says whether the rule found anything to do."""

    def describe(self) -> str:
        """The rule as its author wrote it."""


@dataclass(frozen=True)
class Rename:
    """A tensor under another name."""

    src: Pattern
    dst: Pattern

    def __post_init__(self) -> None:
        require_same_fields("rename", self.src, self.dst)

    def apply(self, table: NameTable) -> bool:
        found = [(self.dst.fill(values), name) for name, values in table.matches(self.src)]
        moved = [(new, table.tensors.pop(name)) for new, name in found]
        for new, expr in moved:
            table.put(new, expr, self.describe())
        return bool(found)

    def describe(self) -> str:
        return f"rename({self.src.text} -> {self.dst.text})"


@dataclass(frozen=True)
class Fuse:
    """Several tensors one after the other along a dimension."""

    dst: Pattern
    srcs: tuple[Pattern, ...]
    dim: int

    def __post_init__(self) -> None:
        for src in self.srcs:
            require_same_fields("fuse", src, self.dst)

    def apply(self, table: NameTable) -> bool:
        bindings = _bindings(table, self.srcs)
        for values in bindings:
            parts = _take(table, [src.fill(values) for src in self.srcs], self.describe())
            if parts and _alike(table, parts, self.dim, self.describe()):
                fused = Concat(tuple(expr for _, expr in parts), self.dim % len(parts[0][1].shape))
                table.put(self.dst.fill(values), fused, self.describe())
        return bool(bindings)

    def describe(self) -> str:
        return f"fuse({self.dst.text} <- {', '.join(src.text for src in self.srcs)})"


@dataclass(frozen=True)
class Split:
    """One tensor cut along a dimension, into equal parts unless sizes are given."""

    src: Pattern
    dsts: tuple[Pattern, ...]
    sizes: tuple[int, ...] | None
    dim: int

    def __post_init__(self) -> None:
        for dst in self.dsts:
            require_same_fields("split", self.src, dst)
        if self.sizes is not None and len(self.sizes) != len(self.dsts):
            raise UsageError(
                f"split({self.src.text}): {len(self.sizes)} sizes for {len(self.dsts)} names"
            )

    def apply(self, table: NameTable) -> bool:
        found = table.matches(self.src)
        for name, values in found:
            expr = table.tensors[name]
            sizes = self._sizes_of(expr)
            if sizes is None:
                wanted = (
                    f"{len(self.dsts)} equal parts" if self.sizes is None else f"{list(self.sizes)}"
                )
                detail = f"dimension {self.dim} of {list(expr.shape)} does not split into {wanted}"
                table.problems.append(Problem("shape", name, detail))
                del table.tensors[name]
                continue
            del table.tensors[name]
            start = 0
            for dst, size in zip(self.dsts, sizes, strict=True):
                part = expr.narrow(self.dim % len(expr.shape), start, start + size)
                table.put(dst.fill(values), part, self.describe())
                start += size
        return bool(found)

    def _sizes_of(self, expr: Expr) -> tuple[int, ...] | None:
        if not -len(expr.shape) <= self.dim < len(expr.shape):
            return None
        whole = expr.shape[self.dim]
        if self.sizes is not None:
            return self.sizes if sum(self.sizes) == whole else None
        return None if whole % len(self.dsts) else (whole // len(self.dsts),) * len(self.dsts)

    def describe(self) -> str:
        return f"split({self.src.text} -> {', '.join(dst.text for dst in self.dsts)})"


@dataclass(frozen=True)
class StackRule:
    """Tensors numbered by one placeholder of `src`, along a new first dimension."""

    dst: Pattern
    src: Pattern
    count: int
    over: str

    def apply(self, table: NameTable) -> bool:
        bindings = [
            {key: text for key, text in values.items() if key != self.over}
            for values in _bindings(table, (self.src,))
        ]
        unique = [dict(items) for items in dict.fromkeys(tuple(b.items()) for b in bindings)]
        for values in unique:
            names = [self.src.fill({**values, self.over: str(e)}) for e in range(self.count)]
            parts = _take(table, names, self.describe())
            if parts and _alike(table, parts, None, self.describe()):
                stacked = Stack(tuple(expr for _, expr in parts))
                table.put(self.dst.fill(values), stacked, self.describe())
        return bool(unique)

    def describe(self) -> str:
        return f"stack({self.dst.text} <- {self.count} x {self.src.text})"


@dataclass(frozen=True)
class TransposeRule:
    """The last two dimensions exchanged."""

    pattern: Pattern

    def apply(self, table: NameTable) -> bool:
        found = table.matches(self.pattern)
        for name, _ in found:
            expr = table.tensors[name]
            if len(expr.shape) < 2:
                detail = f"{list(expr.shape)} has no two dimensions to transpose"
                table.problems.append(Problem("shape", name, detail))
            else:
                table.tensors[name] = Transpose(expr)
        return bool(found)

    def describe(self) -> str:
        return f"transpose({self.pattern.text})"


@dataclass(frozen=True)
class ReorderRule:
    """One dimension seen as several, permuted and merged again."""

    pattern: Pattern
    view: tuple[int, ...]
    permutation: tuple[int, ...]
    dim: int

    def __post_init__(self) -> None:
        if sorted(self.permutation) != list(range(len(self.view))):
            raise UsageError(
                f"reorder({self.pattern.text}): {self.permutation} does not permute {self.view}"
            )

    def apply(self, table: NameTable) -> bool:
        found = table.matches(self.pattern)
        for name, _ in found:
            expr = table.tensors[name]
            dim = self.dim % max(len(expr.shape), 1)
            view = resolve_view(self.view, expr.shape[dim]) if dim < len(expr.shape) else None
            if view is None:
                shape, view_text = list(expr.shape), list(self.view)
                detail = f"dimension {self.dim} of {shape} cannot be seen as {view_text}"
                table.problems.append(Problem("shape", name, detail))
            else:
                table.tensors[name] = Reorder(expr, dim, view, self.permutation)
        return bool(found)

    def describe(self) -> str:
        return f"reorder({self.pattern.text}, {self.view}, {self.permutation})"


@dataclass(frozen=True)
class IgnoreRule:
    """Tensors that nothing takes, and why."""

    pattern: Pattern
    reason: str

    def apply(self, table: NameTable) -> bool:
        found = table.matches(self.pattern)
        for name, _ in found:
            table.ignored.append(Ignored(name, self.reason, table.tensors.pop(name)))
        return bool(found)

    def describe(self) -> str:
        return f"ignore({self.pattern.text}: {self.reason})"


@dataclass(frozen=True)
class TieRule:
    """A parameter that is the same object as another; it changes no tensor."""

    dst: Pattern
    src: Pattern

    def __post_init__(self) -> None:
        require_same_fields("tie", self.dst, self.src)

    def apply(self, table: NameTable) -> bool:
        return True

    def describe(self) -> str:
        return f"tie({self.dst.text} = {self.src.text})"


@dataclass(frozen=True)
class DtypeRule:
    """The dtype that a parameter has, whatever the rest of the model is loaded as."""

    pattern: Pattern
    dtype: torch.dtype

    def apply(self, table: NameTable) -> bool:
        return True

    def describe(self) -> str:
        return f"dtype({self.pattern.text}: {self.dtype})"


def _bindings(table: NameTable, patterns: Iterable[Pattern]) -> list[dict[str, str]]:
    """What the placeholders stand for in any match of any of the patterns, each once, in order."""
    seen = {
        tuple(sorted(values.items())): values
        for pattern in patterns
        for _, values in table.matches(pattern)
    }
    return list(seen.values())


def _take(table: NameTable, names: Sequence[str], rule: str) -> list[tuple[str, Expr]]:
    """Takes the tensors out of the table; if any lacks, a problem is noted and none come back."""
    missing = [name for name in names if name not in table.tensors]
    table.problems += [Problem("missing", name, f"{rule} needs it") for name in missing]
    parts = [(name, table.tensors.pop(name)) for name in names if name in table.tensors]
    return [] if missing else parts


def _alike(table: NameTable, parts: list[tuple[str, Expr]], dim: int | None, rule: str) -> bool:
    """Whether tensors of one dtype and shape (but for `dim`) are joined; notes a problem if not."""
    first_name, first = parts[0]
    if dim is not None and not -len(first.shape) <= dim < len(first.shape):
        table.problems.append(
            Problem("shape", first_name, f"{list(first.shape)} has no dimension {dim} ({rule})")
        )
        return False
    for name, expr in parts[1:]:
        if _rest(expr.shape, dim) != _rest(first.shape, dim) or expr.dtype != first.dtype:
            detail = (
                f"{list(expr.shape)} {expr.dtype} does not join {first_name} "
                f"{list(first.shape)} {first.dtype} ({rule})"
            )
            table.problems.append(Problem("shape", name, detail))
            return False
    return True


def _rest(shape: tuple[int, ...], dim: int | None) -> tuple[int | None, ...]:
    if dim is None or not shape:
        return shape
    return tuple(None if axis == dim % len(shape) else size for axis, size in enumerate(shape))
