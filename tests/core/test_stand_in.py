"""A kernel that does at once what several ops do: when it stands in for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmfw.ops.kernel import DeviceInfo, Kernel
from llmfw.ops.table import OpTable

HERE = __name__
PARTS = {
    "linear": {"in_features": 8, "out_features": 16, "bias": 0},
    "add_rms_norm": {"hidden_size": 16},
}


def made(context) -> Callable[..., Any]:
    """A callable that can be told from others."""
    return lambda *_: context.op


PACK = tuple(
    Kernel(op, f"one.{op}", f"{HERE}:made", priority=50).from_pack("one")
    for op in (*PARTS, "add_linear")
)
OTHER = Kernel("add_rms_norm", "other.norm", f"{HERE}:made", priority=70).from_pack("other")
LESSER = replace(OTHER, priority=30)
BUILT = Kernel(
    "linear", "third.linear", f"{HERE}:made", priority=60, builds_on="one.linear"
).from_pack("third")


def table(kernels: tuple[Kernel, ...] = PACK, select: str = "auto") -> OpTable:
    return OpTable(DeviceInfo(torch.device("cpu"), frozenset()), kernels, select)


def stands_in(ops: OpTable) -> bool:
    found = ops.stand_in("add_linear", torch.float32, PARTS)
    assert found is None or found() == "add_linear"
    return found is not None


@pytest.mark.parametrize(
    ("kernels", "select", "stands"),
    [
        (PACK, "auto", True),
        ((*PACK, OTHER), "auto", False),  # another pack's part goes first
        ((*PACK, LESSER), "auto", True),
        ((*PACK, LESSER), "other", False),
        ((*PACK, OTHER), "one", True),
        ((*PACK, BUILT), "auto", True),  # it leaves the like to the pack's own
        ((*PACK, replace(BUILT, builds_on="")), "auto", False),
        ((*PACK, BUILT), "-one.linear", False),
        ((*PACK, BUILT), "-one", False),
        (PACK, "-one.add_linear", False),
        (PACK, "add_linear=reference", False),
        (PACK, "-one.add_rms_norm", False),
        (PACK, "linear=reference", False),
        (PACK, "reference", False),
        (PACK[:-1], "auto", False),
    ],
)
def test_it_stands_in_for_its_own_packs_kernels_alone(
    kernels: tuple[Kernel, ...], select: str, stands: bool
) -> None:
    assert stands_in(table(kernels, select)) == stands


def test_what_it_would_bypass_is_told() -> None:
    ops = table((*PACK, OTHER))
    assert not stands_in(ops)
    choice = next(c for c in ops.choices.values() if c.context.op == "add_linear")
    assert choice.chosen == "reference"
    assert choice.refused == (
        ("one.add_linear", "would bypass other.norm, which serves add_rms_norm"),
    )
    assert choice.context.shape == PARTS["linear"] | PARTS["add_rms_norm"]


def test_it_is_chosen_once() -> None:
    ops = table()
    found = [ops.stand_in("add_linear", torch.float32, PARTS) for _ in range(2)]
    assert found[0] is found[1]
