"""Kernels are chosen by priority and by name, and every refusal is explained."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from llmfw.errors import KernelError, UsageError
from llmfw.ops import reference
from llmfw.ops.device import cpu_features, cuda_features, device_info, find_compiler
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext, load_object
from llmfw.ops.table import OpTable, reference_of

CPU = DeviceInfo(torch.device("cpu"), frozenset({"cpu", "avx2"}))
HERE = __name__


def slow_norm(x: torch.Tensor) -> torch.Tensor:
    return x


def make_slow(context: OpContext) -> Callable[..., torch.Tensor]:
    return slow_norm


def make_fast(context: OpContext) -> Callable[..., torch.Tensor]:
    def fast_norm(x: torch.Tensor) -> torch.Tensor:
        return x * context["hidden_size"]

    return fast_norm


def make_tuned(context: OpContext) -> Callable[..., torch.Tensor]:
    def tuned_norm(x: torch.Tensor) -> torch.Tensor:
        return x

    tuned_norm.details = f"{context['hidden_size']} threads"  # type: ignore[attr-defined]
    return tuned_norm


def make_misused(context: OpContext) -> Callable[..., torch.Tensor]:
    raise UsageError("LLMFW_TUNE is 'maybe'", hint="use one of auto, off, again")


def make_broken(context: OpContext) -> Callable[..., torch.Tensor]:
    raise RuntimeError("out of registers")


def kernel(name: str, factory: str = "make_slow", pack: str = "a", **more: object) -> Kernel:
    declared = Kernel(op="rms_norm", name=name, factory=f"{HERE}:{factory}", **more)  # type: ignore[arg-type]
    return declared.from_pack(pack)


def chosen(table: OpTable, op: str = "rms_norm") -> str:
    table.resolve(op, torch.float32, hidden_size=8)
    return next(choice.chosen for key, choice in table.choices.items() if key[0] == op)


def refusals(table: OpTable) -> dict[str, str]:
    table.resolve("rms_norm", torch.float32, hidden_size=8)
    (choice,) = table.choices.values()
    return dict(choice.refused)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMFW_KERNELS", raising=False)


def test_without_kernels_the_reference_serves() -> None:
    table = OpTable(CPU)
    assert table.resolve("silu_and_mul", torch.float32) is reference.silu_and_mul
    assert chosen(table) == "reference"


def test_highest_priority_wins_and_ties_go_by_name() -> None:
    low, high = kernel("a.low", priority=5), kernel("a.high", "make_fast", priority=20)
    assert chosen(OpTable(CPU, (low, high))) == "a.high"
    assert chosen(OpTable(CPU, (kernel("a.z"), kernel("a.b")))) == "a.b"


def test_the_callable_knows_its_static_shape_and_is_made_once() -> None:
    table = OpTable(CPU, (kernel("a.fast", "make_fast"),))
    run = table.resolve("rms_norm", torch.float32, hidden_size=8)
    assert run(torch.ones(1)).item() == 8
    assert table.resolve("rms_norm", torch.float32, hidden_size=8) is run
    assert table.resolve("rms_norm", torch.float32, hidden_size=9) is not run
    assert table.resolve("rms_norm", torch.bfloat16, hidden_size=8) is not run


def test_a_choice_tells_what_its_kernel_settled_for() -> None:
    table = OpTable(CPU, (kernel("a.tuned", "make_tuned"),))
    assert chosen(table) == "a.tuned"
    assert [choice.details for choice in table.choices.values()] == ["8 threads"]
    plain = OpTable(CPU, (kernel("a.slow"),))
    assert chosen(plain) == "a.slow"
    assert [choice.details for choice in plain.choices.values()] == [""]


def test_every_refusal_is_explained() -> None:
    def odd_only(context: OpContext) -> str | None:
        return None if context["hidden_size"] % 2 else "serves odd sizes"

    table = OpTable(
        CPU,
        (
            kernel("a.gpu", requires=("cuda", "sm_90")),
            kernel("a.half", dtypes=("float16",)),
            kernel("a.odd", supports=odd_only),
            kernel("a.hidden", priority=-1),
        ),
    )
    assert refusals(table) == {
        "a.gpu": "needs cuda, sm_90",
        "a.half": "serves float16, not float32",
        "a.odd": "serves odd sizes",
        "a.hidden": "serves only when asked for by name",
    }
    assert chosen(table) == "reference"


def test_a_setting_that_cannot_be_is_told_rather_than_the_kernel_left_out() -> None:
    table = OpTable(CPU, (kernel("a.misused", "make_misused", priority=20), kernel("a.next")))
    with pytest.raises(UsageError, match="LLMFW_TUNE is 'maybe'"):
        chosen(table)


def test_a_kernel_that_cannot_be_built_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = OpTable(CPU, (kernel("a.broken", "make_broken", priority=20), kernel("a.next")))
    with caplog.at_level(logging.WARNING):
        assert chosen(table) == "a.next"
    assert "a.broken of pack a is left out: cannot be built: out of registers" in caplog.text


def test_a_kernel_asked_for_by_name_must_be_built() -> None:
    table = OpTable(CPU, (kernel("a.broken", "make_broken"),), select="a.broken")
    with pytest.raises(KernelError, match=r"a\.broken cannot be built: out of registers"):
        chosen(table)


def test_names_declared_twice_name_both_packs() -> None:
    with pytest.raises(KernelError, match=r"a\.norm.*\['a', 'b'\]"):
        OpTable(CPU, (kernel("a.norm", pack="a"), kernel("a.norm", pack="b")))


TWO = (kernel("a.norm", priority=20), kernel("b.norm", pack="b", priority=10))


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ("auto", "a.norm"),
        ("", "a.norm"),
        ("reference", "reference"),
        ("b", "b.norm"),
        ("b.norm", "b.norm"),
        ("-a", "b.norm"),
        ("-a.norm", "b.norm"),
        ("-a, -b", "reference"),
        ("rms_norm=b", "b.norm"),
        ("rms_norm=b.norm", "b.norm"),
        ("rms_norm=reference", "reference"),
        ("silu_and_mul=reference", "a.norm"),
        ("-b,a", "a.norm"),
    ],
)
def test_select(select: str, wanted: str) -> None:
    assert chosen(OpTable(CPU, TWO, select)) == wanted


def test_a_hidden_kernel_serves_when_asked_for() -> None:
    hidden = kernel("a.hidden", priority=-1)
    assert chosen(OpTable(CPU, (*TWO, hidden), "a.hidden")) == "a.hidden"


def test_unknown_names_in_select_are_errors_that_list_the_known() -> None:
    with pytest.raises(KernelError, match="names 'c', which no kernel pack offers") as caught:
        OpTable(CPU, TWO, "c")
    assert "known: auto, a, a.norm, b, b.norm, reference" in str(caught.value)


def test_the_variable_stands_in_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_KERNELS", "reference")
    assert chosen(OpTable(CPU, TWO)) == "reference"
    assert chosen(OpTable(CPU, TWO, "b")) == "b.norm"


def test_unknown_ops() -> None:
    with pytest.raises(KernelError, match="unknown op 'warp'"):
        OpTable(CPU).resolve("warp", torch.float32)
    own = Kernel(
        op="warp", name="a.warp", factory=f"{HERE}:make_slow", reference=f"{HERE}:slow_norm"
    )
    assert reference_of("warp", (own,)) is slow_norm
    assert OpTable(CPU, (own,), "reference").resolve("warp", torch.float32) is slow_norm


def test_load_object() -> None:
    assert load_object(f"{HERE}:slow_norm") is slow_norm


def test_features_of_cpus_and_gpus() -> None:
    assert cpu_features(["avx2", "fma"]) == frozenset()
    assert cpu_features(["avx2", "fma", "f16c"]) == {"avx2"}
    amx = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"]
    assert cpu_features(amx) == {"avx512f", "avx512_bf16", "amx_bf16"}
    assert cuda_features(8, 0) == {"sm_70", "sm_75", "sm_80"}
    assert {"sm_89", "sm_90"} <= cuda_features(9, 0)
    assert "sm_100" not in cuda_features(9, 0)
    assert "sm_133" in cuda_features(13, 3)


def test_device_info() -> None:
    assert "cpu" in device_info(torch.device("cpu")).features
    assert device_info(torch.device("meta")).features == {"meta"}


def test_the_compiler_is_what_cxx_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_compiler() is None
    assert "compiler" not in device_info(torch.device("cpu")).features
