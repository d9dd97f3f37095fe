"""Which kernels are timed at which shapes, and their times as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmfw.errors import UsageError
from llmfw.ops.costs import BENCHES
from llmfw.ops.large_calls import LARGE_CALLS
from llmfw.ops.timing import KernelTime, contexts_of, time_kernel, time_large

if TYPE_CHECKING:
    from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
    from llmfw.ops.table import OpTable

Pair = tuple["Kernel | None", "OpContext"]


def pairs_of_model(ops: OpTable) -> list[Pair]:
    """What a built model runs by, each kernel at each static shape of it, the reference beside."""
    by_name = {kernel.name: kernel for kernel in ops.kernels}
    pairs: list[Pair] = []
    for choice in ops.choices.values():
        if choice.chosen in by_name:
            pairs.append((by_name[choice.chosen], choice.context))
        if choice.context.op in BENCHES:
            pairs.append((None, choice.context))
    return pairs


def pairs_of_kernels(kernels: Sequence[Kernel], info: DeviceInfo, dtype: torch.dtype) -> list[Pair]:
    """Every kernel that serves the device, at its op's own shapes, the references beside."""
    from llmfw.ops.kernel import OpContext

    pairs: list[Pair] = []
    for kernel in sorted(kernels, key=lambda each: (each.op, -each.priority, each.name)):
        like = OpContext(kernel.op, dtype, info)
        pairs += [(kernel, context) for context in contexts_of(kernel, dtype, like)]
    for op in dict.fromkeys(kernel.op for kernel in kernels if kernel.op in BENCHES):
        pairs += [(None, OpContext(op, dtype, info, shape)) for shape in BENCHES[op].shapes]
    return pairs


def time_pairs(pairs: Sequence[Pair], tokens: Sequence[int], kv_len: int) -> Iterator[KernelTime]:
    """The time of every call, those of one op and shape after one another."""
    order = {key: number for number, key in enumerate(dict.fromkeys(map(_key, pairs)))}
    for kernel, context in sorted(pairs, key=lambda pair: order[_key(pair)]):
        yield from time_kernel(kernel, context, tokens=tokens, kv_len=kv_len)


def pairs_with_large_calls(pairs: Sequence[Pair]) -> list[Pair]:
    """The kernels among `pairs` whose ops have large calls.

    Raises:
        UsageError: If there are none.
    """
    found = [each for each in pairs if each[0] is not None and each[1].op in LARGE_CALLS]
    if not found:
        ops = ", ".join(dict.fromkeys(context.op for _, context in pairs))
        hint = f"--large times kernels of {', '.join(sorted(LARGE_CALLS))}"
        raise UsageError(f"no kernel at hand of {ops} has large calls", hint=hint)
    return found


def time_large_calls(pairs: Sequence[Pair]) -> Iterator[KernelTime]:
    """The time of every kernel among `pairs` at its op's large calls, whatever shapes they name."""
    kernels = {kernel.name: (kernel, context) for kernel, context in pairs if kernel is not None}
    for kernel, context in kernels.values():
        yield from time_large(kernel, context.dtype, context.info)


def _key(pair: Pair) -> tuple[Any, ...]:
    context = pair[1]
    return context.op, str(context.dtype), context.code, tuple(sorted(context.shape.items()))


def row_of(time: KernelTime, bandwidth: float, rate: float) -> dict[str, Any]:
    """One call as a row of the report."""
    context = time.context
    return {
        "op": time.op,
        "shape": " ".join(f"{name}={value}" for name, value in context.shape.items()),
        "dtype": str(context.dtype).removeprefix("torch."),
        "case": time.case,
        "kernel": time.kernel,
        "us": float(f"{time.us:.4g}"),
        "gb_per_s": float(f"{time.bytes_per_s / 1e9:.4g}"),
        "gflops": float(f"{time.operations_per_s / 1e9:.4g}"),
        "of_floor": float(f"{time.of_floor(bandwidth, rate):.3g}"),
    }
