"""How long a kernel takes: over rotated arguments, so that memory is really read.

Used by `llmfw kernels bench`. Copies of the arguments, together larger than the caches, are taken
in turn; on a GPU all calls are one CUDA graph where the kernel can be captured.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmfw.errors import KernelError
from llmfw.ops.costs import BENCHES, Arguments, Cost, CostOf, moved
from llmfw.ops.device import as_current
from llmfw.ops.drawn import Case
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext, load_object
from llmfw.ops.large_calls import LARGE_CALLS
from llmfw.ops.table import reference_of

COLD_BYTES = 256 << 20
MOST_COPIES = 32
SECONDS = 0.3  # at least so long are calls repeated
MOST_CALLS = 2000


@dataclass(frozen=True)
class KernelTime:
    """One kernel at one call.

    Args:
        op, kernel: Names; "reference" is torch's.
        context: The static shape, dtype and device.
        case: What the call is, e.g. "tokens=8".
        us: Microseconds of a call.
        cost: What the call has to do at least.
    """

    op: str
    kernel: str
    context: OpContext
    case: str
    us: float
    cost: Cost

    @property
    def bytes_per_s(self) -> float:
        """Bytes that have to be moved over the time."""
        return self.cost.nbytes / self.us * 1e6

    @property
    def operations_per_s(self) -> float:
        """Operations over the time."""
        return self.cost.operations / self.us * 1e6

    def of_floor(self, bandwidth: float, rate: float) -> float:
        """The least time that the machine allows over the time taken.

        Args:
            bandwidth: Bytes a second of reading memory.
            rate: Operations a second of a large matrix product.
        """
        floor = max(self.cost.nbytes / bandwidth, self.cost.operations / rate)
        return floor * 1e6 / self.us


def contexts_of(kernel: Kernel, dtype: torch.dtype, like: OpContext) -> list[OpContext]:
    """The shapes worth timing for a kernel's op: of core's table, or of the op's check."""
    if kernel.op in BENCHES:
        shapes = BENCHES[kernel.op].shapes
    elif kernel.op in INPUTS:
        shapes = INPUTS[kernel.op].shapes[-1:]
    else:
        shapes = ({},)
    return [OpContext(kernel.op, dtype, like.info, shape) for shape in shapes]


def time_kernel(
    kernel: Kernel | None,
    context: OpContext,
    *,
    tokens: Iterable[int] = (1, 32),
    kv_len: int = 1024,
) -> Iterator[KernelTime]:
    """Times a kernel, or the reference, at one static shape.

    Args:
        kernel: None for the op's reference in core.
        context: The shape; a kernel that refuses it gives nothing.
        tokens: Tokens of a call; ops without an entry in `BENCHES` are timed at the largest call of
            their check instead.
        kv_len: Tokens of each request in the cache, where the op reads one.

    Raises:
        KernelError: If there is nothing to draw inputs with.
    """
    if kernel is None or kernel.refusal(context) is None:
        yield from _timed(kernel, context, _calls(kernel, context, tuple(tokens), kv_len))


def time_large(kernel: Kernel, dtype: torch.dtype, info: DeviceInfo) -> Iterator[KernelTime]:
    """Times a kernel at its op's `LARGE_CALLS`; nothing where there are none or it refuses them."""
    for call in LARGE_CALLS.get(kernel.op, ()):
        context = OpContext(kernel.op, dtype, info, call.shape, call.code)
        if kernel.refusal(context) is None:
            arguments = BENCHES[kernel.op].arguments(context, call.tokens, call.kv_len)
            changed = call.changed(arguments) if call.changed else arguments
            label = f"tokens={call.tokens} {call.note}".rstrip()
            yield from _timed(kernel, context, [(label, changed)])


def _timed(
    kernel: Kernel | None, context: OpContext, calls: Iterable[tuple[str, Arguments]]
) -> Iterator[KernelTime]:
    device = context.info.device
    with as_current(device):
        run = reference_of(context.op) if kernel is None else kernel.build(context)
    name = "reference" if kernel is None else kernel.name
    cost_of = _cost_of(kernel, context)
    for case, arguments in calls:
        with as_current(device), torch.inference_mode():
            results = _tensors(run(*_prepared(run, _copied(arguments))))
            cost = cost_of(context, arguments, results)
            copies = _copies(arguments, cost)
            held = [_prepared(run, _copied(arguments)) for _ in range(copies)]
            us = _microseconds([_call(run, each) for each in held], device)
        yield KernelTime(context.op, name, context, case, us, cost)


def _calls(
    kernel: Kernel | None, context: OpContext, tokens: Sequence[int], kv_len: int
) -> Iterator[tuple[str, Arguments]]:
    bench = BENCHES.get(context.op)
    if bench is not None:
        for count in tokens:
            yield f"tokens={count}", bench.arguments(context, count, kv_len)
        return
    if kernel is not None and kernel.inputs is not None:
        draw: Callable[..., Iterable[Any]] = load_object(kernel.inputs)
    elif context.op in INPUTS:
        draw = INPUTS[context.op].draw
    else:
        raise KernelError(
            f"op {context.op!r} cannot be timed: nothing draws inputs for it",
            hint="name a function that does in the kernel's `inputs`",
        )
    cases = [
        each if isinstance(each, Case) else Case(f"case {number}", each)
        for number, each in enumerate(draw(context, torch.Generator().manual_seed(0)))
    ]
    largest = max(cases, key=lambda case: moved(context, case.arguments, ()).nbytes)
    yield largest.label, largest.arguments


def _cost_of(kernel: Kernel | None, context: OpContext) -> CostOf:
    if context.op in BENCHES:
        return BENCHES[context.op].cost
    if kernel is not None and kernel.cost is not None:
        return load_object(kernel.cost)  # type: ignore[no-any-return]
    return moved


def _copies(arguments: Arguments, cost: Cost) -> int:
    """Enough to leave the caches; few where the tensors are larger than what a call touches."""
    taken = sum(each.nbytes for each in arguments if isinstance(each, torch.Tensor))
    return int(min(MOST_COPIES, max(2, COLD_BYTES // max(cost.nbytes, taken, 1))))


def _call(run: Callable[..., object], arguments: Sequence[Any]) -> Callable[[], object]:
    return lambda: run(*arguments)


def _copied(arguments: Arguments) -> list[Any]:
    """Tensors of their own; views of one tensor stay views of one."""
    return copy.deepcopy(list(arguments))


def _prepared(run: Callable[..., object], arguments: list[Any]) -> list[Any]:
    """The weight in the kernel's own layout, where it has one."""
    prepare = getattr(run, "prepare", None)
    if prepare is not None:
        arguments[1] = prepare(arguments[1])
    return arguments


def _tensors(result: object) -> list[torch.Tensor]:
    found = result if isinstance(result, (tuple, list)) else [result]
    return [each for each in found if isinstance(each, torch.Tensor)]


def _microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    return _on_cuda(calls, device) if device.type == "cuda" else _on_host(calls)


def _on_host(calls: Sequence[Callable[[], object]]) -> float:
    """The best single call: what other processes take from this one does not count."""
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(times) < len(calls) or (len(times) < MOST_CALLS and time.perf_counter() < until):
        run = calls[len(times) % len(calls)]
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times)


def _on_cuda(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """The best mean of a pass over all calls, between two events."""
    one_pass = _graph_of(calls, device)
    best = float("inf")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    until = time.perf_counter() + SECONDS
    passes = 0
    while passes < 3 or time.perf_counter() < until:
        begin.record()
        one_pass()
        end.record()
        end.synchronize()
        best = min(best, 1e3 * begin.elapsed_time(end) / len(calls))
        passes += 1
    return best


def _graph_of(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """A replay of all calls; the calls themselves where one of them cannot be captured."""

    def eager() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        eager()  # compiles and tunes what must not happen in a capture
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            eager()
    except RuntimeError:  # it waits for the device, as references do
        torch.cuda.synchronize(device)
        return eager
    return graph.replay
