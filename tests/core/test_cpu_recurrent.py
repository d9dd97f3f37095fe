"""Recurrent layers' CPU kernels as the layers call them: parts of wider projections, any batch."""

from __future__ import annotations

import pytest
import torch

from llmfw.kernels.cpu import library
from llmfw.kernels.cpu.declare import kernels
from llmfw.ops import reference_state
from llmfw.ops.device import device_info
from llmfw.ops.kernel import OpContext
from recurrent_batches import BATCHES, SLOTS, batch, strided

INFO = device_info(torch.device("cpu"))
KERNELS = {kernel.op: kernel for kernel in kernels()}

pytestmark = pytest.mark.skipif(
    "avx2" not in INFO.features or library.problem() is not None,
    reason="the CPU kernels are not built here",
)


def arguments(op: str, name: str) -> tuple[dict[str, int], tuple[object, ...], int]:
    """Static shape, arguments that are views of wider tensors, and which of them is the state."""
    torch.manual_seed(0)
    metadata = batch(name)
    tokens = sum(metadata.query_lens)
    wide = torch.randn(tokens, 200)
    if op == "causal_conv1d":
        x, weight, bias = wide[:, 3:43], torch.randn(40, 1, 4).squeeze(1), torch.randn(40)
        state = strided(SLOTS, 3, 40)
        return {"channels": 40, "kernel_size": 4}, (x, weight, bias, state, metadata, True), 3
    b, c, d, dt_bias = wide[:, 2:9], wide[:, 9:16], torch.randn(24), torch.randn(24)
    if op == "selective_scan":
        x, dt, z = (wide[:, start : start + 24] for start in (20, 44, 90))
        a, state = -16 * torch.rand(24, 7), strided(SLOTS, 24, 7)
        shape = {"channels": 24, "state_size": 7}
        return shape, (x, dt, a, b, c, d, z, dt_bias, state, metadata), 8
    x, dt = wide[:, 16:64].unflatten(1, (6, 8)), wide[:, 70:76]
    b, c = (part.unflatten(1, (2, 3)) for part in (wide[:, 80:86], wide[:, 90:96]))
    a, state = -16 * torch.rand(6), strided(SLOTS, 6, 8, 3)
    shape = {"num_heads": 6, "head_dim": 8, "num_groups": 2, "state_size": 3}
    limit = (0.2, 1.5)
    return shape, (x, dt, a, b, c, d[:6], dt_bias[:6], limit, state, metadata), 8


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan", "ssd_scan"])
@pytest.mark.parametrize("name", BATCHES)
def test_parts_of_wider_tensors(op: str, name: str, monkeypatch: pytest.MonkeyPatch):
    shape, args, state = arguments(op, name)
    run = KERNELS[op].build(OpContext(op, torch.float32, INFO, shape))
    mine = [*args]
    mine[state] = strided(*args[state].shape).copy_(args[state])
    want = getattr(reference_state, op)(*args)

    def unwanted(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference_state, op, unwanted)
    got = run(*mine)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine[state], args[state], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan", "ssd_scan"])
def test_inputs_other_than_declared_go_to_the_reference(op: str):
    shape, args, state = arguments(op, "mixed")
    run = KERNELS[op].build(OpContext(op, torch.float32, INFO, shape))
    wide, other = args[0].double(), [*args]
    other[0], other[state] = wide, args[state].clone()
    if op == "causal_conv1d":
        other[state] = other[state].double()
    mine = [*other]
    mine[state] = other[state].clone()
    want = getattr(reference_state, op)(*other)
    torch.testing.assert_close(run(*mine), want)
    torch.testing.assert_close(mine[state], other[state])


def test_what_does_not_fit_is_declined():
    taps = OpContext("causal_conv1d", torch.float32, INFO, {"channels": 8, "kernel_size": 9})
    assert KERNELS["causal_conv1d"].refusal(taps) == "serves up to 8 tokens a sum, not 9"
    wide = {"channels": 8, "state_size": 257}
    scan = OpContext("selective_scan", torch.float32, INFO, wide)
    assert "states of up to 256 numbers a row" in str(KERNELS["selective_scan"].refusal(scan))
