"""Is a kernel right? Draws inputs, poisons what it allocates, compares with the reference.

Used by `llmfw kernels check` and by the tests of every kernel pack, in this repository or
elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from llmfw.errors import KernelError
from llmfw.ops.device import as_current
from llmfw.ops.drawn import Case
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DTYPE_NAMES, DeviceInfo, Kernel, OpContext, load_object
from llmfw.ops.table import reference_of


@dataclass(frozen=True)
class CaseResult:
    """One call's ||out - ref|| / ||ref||, or `problem` where there was nothing to compare."""

    context: OpContext
    label: str
    error: float
    tolerance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the kernel gave the reference's result within its tolerance."""
        return self.problem is None and self.error <= self.tolerance

    def __str__(self) -> str:
        facts = " ".join(f"{name}={value}" for name, value in self.context.shape.items())
        facts += f" code={self.context.code!r}" if self.context.code else ""
        dtype = str(self.context.dtype).removeprefix("torch.")
        outcome = self.problem or f"error {self.error:.1e}, allowed {self.tolerance:.1e}"
        return f"{dtype} {facts} [{self.label}]: {outcome}"


@dataclass(frozen=True)
class KernelReport:
    """All cases of one kernel, and the contexts it declined with its reasons."""

    kernel: str
    results: tuple[CaseResult, ...]
    declined: tuple[tuple[OpContext, str], ...]

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it was right."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The cases that were wrong."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def worst(self) -> CaseResult | None:
        """The case nearest to its tolerance, or beyond it."""
        return max(self.results, key=_nearness, default=None)


def _nearness(result: CaseResult) -> tuple[bool, float]:
    return not result.passed, result.error / (result.tolerance or 1.0)


def check_kernel(
    kernel: Kernel,
    info: DeviceInfo,
    *,
    dtypes: Iterable[str] | None = None,
    shapes: Iterable[Mapping[str, int]] | None = None,
    seed: int = 0,
) -> KernelReport:
    """Compares a kernel with its reference over drawn inputs on `info.device`.

    Args:
        kernel: What to check. For an op of its own it must name `reference` and `inputs`: the
            latter, called with (context, generator), yields `Case`s or plain tuples of arguments.
        info: The device and its features.
        dtypes: Names of dtypes; all that the kernel declares when left out.
        shapes: Static shapes; the op's own list when left out.
        seed: Of the inputs.

    Raises:
        KernelError: If the op is unknown and the kernel names no reference or inputs.
    """
    reference = reference_of(kernel.op, (kernel,))
    known = INPUTS.get(kernel.op)
    if known is None and kernel.inputs is None:
        raise KernelError(
            f"kernel {kernel.name} cannot be checked: op {kernel.op!r} is not one of core's",
            hint="name a function that draws inputs in the kernel's `inputs`",
        )
    draw = known.draw if kernel.inputs is None and known else load_object(str(kernel.inputs))
    wanted = tuple(shapes) if shapes is not None else known.shapes if known else ({},)
    codes = known.codes if known else ("",)
    results: list[CaseResult] = []
    declined: list[tuple[OpContext, str]] = []
    for dtype in tuple(dtypes) if dtypes is not None else kernel.dtypes:
        for shape, code in itertools.product(wanted, codes):
            context = OpContext(kernel.op, DTYPE_NAMES[dtype], info, shape, code)
            reason = kernel.refusal(context)
            if reason is not None:
                declined.append((context, reason))
                continue
            with as_current(info.device):
                run, tolerance = kernel.build(context), kernel.tolerance[dtype]
            for case in _cases(draw, context, seed):
                compared = known.compared if kernel.inputs is None and known else None
                error, problem = _compare(run, reference, case, info.device, compared)
                results.append(CaseResult(context, case.label, error, tolerance, problem))
    return KernelReport(kernel.name, tuple(results), tuple(declined))


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; infinite where out is not finite and ref is."""
    if ref.numel() == 0:
        return 0.0
    wide_out, wide_ref = out.double(), ref.double()
    difference = float((wide_out - wide_ref).norm())
    size = float(wide_ref.norm())
    error = difference / size if size > 0 else difference
    return error if error == error else float("inf")


def _cases(draw: Callable[..., Iterable[object]], context: OpContext, seed: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(seed)
    for number, drawn in enumerate(draw(context, generator)):
        if isinstance(drawn, Case):
            yield drawn
        else:
            assert isinstance(drawn, tuple)
            yield Case(f"case {number}", drawn)


def _compare(
    run: Callable[..., object],
    reference: Callable[..., object],
    case: Case,
    device: torch.device,
    compared: Callable[[tuple[object, ...], object], object] | None = None,
) -> tuple[float, str | None]:
    theirs, ours = _copied(case.arguments), _copied(case.arguments)

    def results(call: Callable[..., object], arguments: list[object]) -> list[object]:
        result = call(*arguments)
        return _tensors(compared(tuple(arguments), result) if compared else result)

    with as_current(device), torch.inference_mode():
        wanted = results(reference, theirs) + [theirs[i] for i in case.written]
        prepare = getattr(run, "prepare", None)
        if prepare is not None:
            ours[1] = prepare(ours[1])
        try:
            with _poisoned(device, wanted):
                result = results(run, ours)
        except Exception as exc:
            return float("inf"), f"raised {type(exc).__name__}: {exc}"
    got = result + [ours[i] for i in case.written]
    if len(got) != len(wanted):
        return float("inf"), f"gave {len(got)} tensors, the reference {len(wanted)}"
    worst = 0.0
    for out, ref in zip(got, wanted, strict=True):
        assert isinstance(out, torch.Tensor)
        assert isinstance(ref, torch.Tensor)
        if out.shape != ref.shape or out.dtype != ref.dtype:
            return float("inf"), (
                f"gave {tuple(out.shape)} {out.dtype}, the reference {tuple(ref.shape)} {ref.dtype}"
            )
        worst = max(worst, relative_error(out, ref))
    return worst, None


def _copied(arguments: tuple[object, ...]) -> list[object]:
    """Copies that keep their strides; views of one storage become views of one copy."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        old = tensor.untyped_storage()
        new = storages.setdefault(old.data_ptr(), old.clone())
        return tensor.new_empty(0).set_(
            new, tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    return [copy(a) if isinstance(a, torch.Tensor) else a for a in arguments]


def _tensors(result: object) -> list[object]:
    return list(result) if isinstance(result, tuple | list) else [result]


def poison_like(tensor: torch.Tensor) -> torch.Tensor:
    """Of its shape and dtype: NaN, the greatest integer, or true; what torch fills on the CPU."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        return torch.full_like(tensor, float("nan"))
    return torch.full_like(tensor, True if dtype is torch.bool else torch.iinfo(dtype).max)


@contextlib.contextmanager
def _poisoned(device: torch.device, like: list[object]) -> Iterator[None]:
    """Fresh memory holds NaN, or the greatest integer, so that an element never written shows.

    On the CPU torch fills every `empty`; elsewhere blocks of the results' sizes are filled and
    freed, which the caching allocator hands out next.
    """
    if device.type != "cpu":
        blocks = [poison_like(t) for t in like if isinstance(t, torch.Tensor)]
        del blocks
        yield
        return
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
