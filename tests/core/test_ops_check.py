"""The checker of kernels finds wrong numbers, unwritten elements, stray writes and exceptions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.declarations import KERNELS as CUPY_KERNELS
from llmfw.ops import reference
from llmfw.ops.check import check_kernel, poison_like, relative_error
from llmfw.ops.device import cuda_features
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DTYPE_NAMES, DeviceInfo, Kernel, OpContext

CPU = DeviceInfo(torch.device("cpu"), frozenset({"cpu"}))


def kernel(factory: str, op: str = "rms_norm", **more: object) -> Kernel:
    return Kernel(op=op, name=f"test.{factory}", factory=f"{__name__}:{factory}", **more)  # type: ignore[arg-type]


def reference_itself(context: OpContext) -> object:
    return reference.REFERENCES[context.op]


def a_little_off(context: OpContext) -> object:
    return lambda *a: reference.rms_norm(*a) * 1.05


def last_element_unwritten(context: OpContext) -> object:
    def run(x: torch.Tensor, *rest: object) -> torch.Tensor:
        out = torch.empty_like(x)
        out[..., :-1] = reference.rms_norm(x, *rest)[..., :-1]  # type: ignore[arg-type]
        return out

    return run


def reads_from_an_aligned_address(context: OpContext) -> object:
    def run(x: torch.Tensor, *rest: object) -> torch.Tensor:
        first = x.storage_offset() * x.itemsize // 16 * 16 // x.itemsize
        there = x.as_strided(x.shape, x.stride(), first)
        return reference.rms_norm(there, *rest)  # type: ignore[arg-type]

    return run


def leaves_rows_beyond_a_grid(context: OpContext) -> object:
    def run(x: torch.Tensor, *rest: object) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:1024] = reference.rms_norm(x[:1024], *rest)  # type: ignore[arg-type]
        return out

    return run


def raises(context: OpContext) -> object:
    def run(*args: object) -> torch.Tensor:
        raise RuntimeError("launch failed")

    return run


def wrong_shape(context: OpContext) -> object:
    return lambda *a: reference.rms_norm(*a)[..., None]


def two_results(context: OpContext) -> object:
    return lambda *a: (a[0], a[0])


def writes_padding(context: OpContext) -> object:
    def run(*args: torch.Tensor) -> torch.Tensor:
        slots = args[5].clamp(min=0)
        return reference.rope_and_cache(*args[:5], slots, *args[6:])  # type: ignore[arg-type, call-arg]

    return run


@pytest.mark.parametrize("op", sorted(INPUTS))
def test_every_reference_agrees_with_itself(op: str) -> None:
    report = check_kernel(kernel("reference_itself", op), CPU)
    assert report.passed
    assert report.worst is not None
    assert report.worst.error == 0.0


def test_every_op_of_core_has_inputs() -> None:
    assert set(INPUTS) == set(reference.REFERENCES)


@pytest.mark.parametrize("kernel", CUPY_KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_for_gpus_serves_something_that_is_checked(kernel: Kernel) -> None:
    """In each dtype that it names; where it serves nothing, `llmfw kernels check` has no result."""
    info = DeviceInfo(torch.device("cpu"), cuda_features(9, 0) | {"cuda", "cupy"})
    drawn = INPUTS[kernel.op]
    for dtype in kernel.dtypes:
        contexts = [
            OpContext(kernel.op, DTYPE_NAMES[dtype], info, shape, code)
            for shape in drawn.shapes
            for code in drawn.codes
        ]
        assert any(kernel.refusal(context) is None for context in contexts), dtype


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("a_little_off", "error 5.0e-02, allowed 1.0e-05"),
        ("last_element_unwritten", "error inf"),
        ("reads_from_an_aligned_address", "[tokens=3 unaligned]: error"),
        ("leaves_rows_beyond_a_grid", "[tokens=2050]: error inf"),
        ("raises", "raised RuntimeError: launch failed"),
        ("wrong_shape", "gave (0, 1, 1) torch.float32, the reference (0, 1)"),
        ("two_results", "gave 2 tensors, the reference 1"),
    ],
)
def test_finds(factory: str, says: str) -> None:
    report = check_kernel(kernel(factory), CPU, dtypes=["float32"])
    assert not report.passed
    assert any(says in str(failure) for failure in report.failures)
    assert not torch.are_deterministic_algorithms_enabled()


def test_finds_a_write_to_a_slot_of_padding() -> None:
    report = check_kernel(kernel("writes_padding", "rope_and_cache"), CPU, dtypes=["float32"])
    assert report.failures


def test_declined_contexts_are_listed_and_nothing_checked_is_no_pass() -> None:
    needs = kernel("reference_itself", requires=("warp_drive",))
    report = check_kernel(needs, CPU)
    assert not report.passed
    assert not report.results
    assert {reason for _, reason in report.declined} == {"needs warp_drive"}


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def double_kernel(context: OpContext) -> object:
    return double


def double_inputs(context: OpContext, generator: torch.Generator) -> Iterator[tuple[torch.Tensor]]:
    yield (torch.randn(3, generator=generator).to(context.dtype),)


def test_an_op_of_a_packs_own_brings_reference_and_inputs() -> None:
    own = kernel("double_kernel", "double", reference=f"{__name__}:double")
    with pytest.raises(KernelError, match="inputs"):
        check_kernel(own, CPU)
    own = kernel(
        "double_kernel",
        "double",
        reference=f"{__name__}:double",
        inputs=f"{__name__}:double_inputs",
    )
    assert check_kernel(own, CPU).passed


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_results_of_any_dtype_are_poisoned_as_torch_does_on_the_cpu(dtype: torch.dtype) -> None:
    """Kernels of integer results (tokens, places) are checked on GPUs too."""
    filled = poison_like(torch.zeros(3, dtype=dtype))
    torch.use_deterministic_algorithms(True)
    try:
        expected = torch.empty(3, dtype=dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(filled, expected, rtol=0, atol=0, equal_nan=True)


def test_relative_error() -> None:
    ref = torch.tensor([3.0, 4.0])
    assert relative_error(ref, ref) == 0.0
    assert relative_error(torch.tensor([3.0, 9.0]), ref) == pytest.approx(1.0)
    assert relative_error(torch.tensor([3.0, float("nan")]), ref) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
