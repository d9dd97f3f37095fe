"""Resolution: each op of each module becomes one plain callable, chosen while building."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmfw.errors import KernelError, UsageError
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext, load_object
from llmfw.ops.reference import REFERENCES

logger = logging.getLogger("llmfw.ops")

SELECT_VARIABLE = "LLMFW_KERNELS"


@dataclass(frozen=True)
class Choice:
    """What was chosen for one op and static shape, what it settled for, and why not the others."""

    context: OpContext
    chosen: str
    refused: tuple[tuple[str, str], ...]
    details: str = ""


@dataclass
class OpTable:
    """The kernels at hand and the choices made from them.

    Args:
        info: The device and its features.
        kernels: What the kernel packs offer.
        select: "auto" is what `LLMFW_KERNELS` says, and where that is not set takes the highest
            priority that serves; "reference" takes torch's references
            only; otherwise a comma list of "pack", "pack.kernel", "op=name" or "-name" entries that
            bisects a model: names given are preferred, names with a minus are refused.
    """

    info: DeviceInfo
    kernels: tuple[Kernel, ...] = ()
    select: str = "auto"
    choices: dict[tuple[Any, ...], Choice] = field(default_factory=dict)
    _built: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [kernel.name for kernel in self.kernels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            owners = {name: [k.pack for k in self.kernels if k.name == name] for name in twice}
            raise KernelError(
                f"kernel names declared twice: {owners}", hint="uninstall one of the packs"
            )
        select = os.environ.get(SELECT_VARIABLE, "auto") if self.select == "auto" else self.select
        self._selection = _Selection(select, self.kernels)

    def resolve(
        self, op: str, dtype: torch.dtype, code: str = "", /, **shape: int
    ) -> Callable[..., Any]:
        """The callable that serves `op` for this dtype, `OpContext.code` and static shape.

        Raises:
            KernelError: If neither a kernel nor a reference serves it.
            UsageError: If a setting of the chosen kernel cannot be.
        """
        key = _key(op, dtype, code, shape)
        if key not in self._built:
            context = OpContext(op, dtype, self.info, shape, code)
            self._built[key], self.choices[key] = self._choose(context, {})
        return self._built[key]

    def find(
        self, op: str, dtype: torch.dtype, code: str = "", /, **shape: int
    ) -> Callable[..., Any] | None:
        """As `resolve`, but None where nothing better than the reference serves."""
        key = _key(op, dtype, code, shape)
        found = self.resolve(op, dtype, code, **shape)
        return None if self.choices[key].chosen == "reference" else found

    def stand_in(
        self, op: str, dtype: torch.dtype, parts: Mapping[str, Mapping[str, int]]
    ) -> Callable[..., Any] | None:
        """The callable of an op that does at once what several do, or None where they do it alone.

        A kernel stands in only for kernels of its own pack: whoever replaces a part, or switches
        it off, gets what was asked for.

        Args:
            op: What stands in; its static shape is that of all parts together.
            dtype: The model's.
            parts: The ops it stands in for, with their static shapes.
        """
        shape = {name: size for part in parts.values() for name, size in part.items()}
        key = _key(op, dtype, "", shape)
        if key not in self._built:
            for part, own in parts.items():
                self.resolve(part, dtype, **own)
            chosen = {
                part: self.choices[_key(part, dtype, "", own)].chosen for part, own in parts.items()
            }
            context = OpContext(op, dtype, self.info, shape)
            self._built[key], self.choices[key] = self._choose(context, chosen)
        return None if self.choices[key].chosen == "reference" else self._built[key]

    def ranked(self, op: str) -> list[Kernel]:
        """The kernels of an op, the one that is asked first at the front."""
        return sorted(
            (kernel for kernel in self.kernels if kernel.op == op),
            key=lambda kernel: (-self._selection.rank(kernel), -kernel.priority, kernel.name),
        )

    def refusal(self, kernel: Kernel, context: OpContext) -> str | None:
        """Why a kernel does not serve `context` here, or None when it does; builds nothing."""
        return self.ruled_out(kernel) or kernel.refusal(context)

    def ruled_out(self, kernel: Kernel) -> str | None:
        """Why `select` lets a kernel serve nothing, whatever the shape, or None."""
        return self._selection.refusal(kernel)

    def _bypassed(self, kernel: Kernel, parts: Mapping[str, str]) -> str | None:
        """What of another pack a kernel would bypass; `parts` tells what serves which op."""
        own = {each.name for each in self.kernels if each.pack == kernel.pack}
        own |= {each.name for each in self.kernels if each.builds_on in own}
        others = (
            f"{chosen}, which serves {op}" for op, chosen in parts.items() if chosen not in own
        )
        other = next(others, None)
        return f"would bypass {other}" if other else None

    def _choose(
        self, context: OpContext, parts: Mapping[str, str]
    ) -> tuple[Callable[..., Any], Choice]:
        refused: list[tuple[str, str]] = []
        for kernel in self.ranked(context.op):
            reason = self.refusal(kernel, context) or self._bypassed(kernel, parts)
            if reason is None:
                try:
                    built = kernel.build(context)
                except UsageError:  # a setting that cannot be is no fault of the kernel
                    raise
                except Exception as exc:
                    if self._selection.rank(kernel):
                        raise KernelError(f"kernel {kernel.name} cannot be built: {exc}") from exc
                    reason = f"cannot be built: {exc}"
                    logger.warning(
                        "kernel %s of pack %s is left out: %s", kernel.name, kernel.pack, reason
                    )
                else:
                    details = getattr(built, "details", "")
                    return built, Choice(context, kernel.name, tuple(refused), details)
            refused.append((kernel.name, reason))
        reference = reference_of(context.op, self.kernels)
        return reference, Choice(context, "reference", tuple(refused))


def _key(op: str, dtype: torch.dtype, code: str, shape: Mapping[str, int]) -> tuple[Any, ...]:
    return op, dtype, code, tuple(sorted(shape.items()))


def reference_of(op: str, kernels: Iterable[Kernel] = ()) -> Callable[..., Any]:
    """The torch reference of an op of core, or of one that a kernel pack defines.

    Raises:
        KernelError: If the op is unknown.
    """
    if op in REFERENCES:
        return REFERENCES[op]
    for kernel in kernels:
        if kernel.op == op and kernel.reference:
            return load_object(kernel.reference)  # type: ignore[no-any-return]
    raise KernelError(f"unknown op {op!r}", hint=f"known ops: {', '.join(sorted(REFERENCES))}")


class _Selection:
    """The parsed `select` string."""

    def __init__(self, select: str, kernels: tuple[Kernel, ...]) -> None:
        self.reference_only = select == "reference"
        self.wanted: set[str] = set()
        self.unwanted: set[str] = set()
        self.by_op: Mapping[str, str] = {}
        if select in {"auto", "reference", ""}:
            return
        known = {k.name for k in kernels} | {k.pack for k in kernels} | {"reference"}
        by_op: dict[str, str] = {}
        for entry in filter(None, (part.strip() for part in select.split(","))):
            op, _, name = entry.rpartition("=")
            bare = name.removeprefix("-")
            if bare not in known:
                raise KernelError(
                    f"--kernels names {bare!r}, which no kernel pack offers",
                    hint=f"known: auto, {', '.join(sorted(known))}",
                )
            if op:
                by_op[op] = bare
            elif name.startswith("-"):
                self.unwanted.add(bare)
            else:
                self.wanted.add(bare)
        self.by_op = by_op
        self.unwanted |= {k.name for k in kernels if k.pack in self.unwanted}

    def rank(self, kernel: Kernel) -> int:
        """1 for a kernel that was asked for by name."""
        named = self.by_op.get(kernel.op)
        return int(
            named in {kernel.name, kernel.pack} or bool({kernel.name, kernel.pack} & self.wanted)
        )

    def refusal(self, kernel: Kernel) -> str | None:
        """Why the selection rules the kernel out, or None."""
        if self.reference_only or self.by_op.get(kernel.op) == "reference":
            return "references were asked for"
        if {kernel.name, kernel.pack} & self.unwanted:
            return "switched off by name"
        if kernel.builds_on in self.unwanted:
            return f"builds on {kernel.builds_on}, which is switched off by name"
        if kernel.priority < 0 and not self.rank(kernel):
            return "serves only when asked for by name"
        if kernel.op in self.by_op and not self.rank(kernel):
            return f"{self.by_op[kernel.op]} was asked for"
        return None
