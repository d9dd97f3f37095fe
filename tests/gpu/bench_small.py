"""Sections of the benchmark: limits, launches, elementwise kernels, the ends of a decode step."""

from __future__ import annotations

import functools
import time

import torch

from gpu.bench_common import BF16, DEVICE, MODELS, Run, kernel, randn, report, rope_shape, rotated
from llmfw.kernels.cupy import tune
from llmfw.ops.reference import REFERENCES


def limits() -> None:
    """Copy bandwidth, and the time of an empty dependent kernel in a graph."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    us = tune.graph_time([functools.partial(b.copy_, a)], launches=4)
    report("limits", "copy 2 GiB (read + write)", us, 2 * a.numel())
    del a, b
    x = randn(1, 64)
    call = kernel("rms_norm", {"hidden_size": 64})
    weight = randn(64)
    us = tune.graph_time([lambda: call(x, weight, 1e-6)], launches=200)
    report("limits", "smallest kernel in a graph", us, 256)


def launches() -> None:
    """Host time of one eager call."""
    x, weight = randn(1, 4096), randn(4096)
    ours = kernel("rms_norm", {"hidden_size": 4096})
    both = kernel("add_rms_norm", {"hidden_size": 4096})
    residual = randn(1, 4096)
    out = torch.empty_like(x)
    calls: list[tuple[str, Run]] = [
        ("llmfw rms_norm", lambda: ours(x, weight, 1e-6)),
        ("llmfw add_rms_norm (in place)", lambda: both(x, residual, weight, 1e-6)),
        ("torch.add out=", lambda: torch.add(x, x, out=out)),
        ("torch.empty", lambda: torch.empty_like(x)),
    ]
    for label, call in calls:
        for _ in range(200):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        us = (time.perf_counter() - start) / 500 * 1e6
        torch.cuda.synchronize()
        report("launch", label, us, 0)


def elementwise() -> None:
    """Norms, activation, rope: decode and prefill row counts, torch's reference beside."""
    for name, (hidden, inner, heads, kv_heads, dim, _, _) in MODELS.items():
        for rows in (1, 32, 256, 8192):
            weight = randn(hidden)
            rms = kernel("rms_norm", {"hidden_size": hidden})
            add = kernel("add_rms_norm", {"hidden_size": hidden})
            act = kernel("silu_and_mul", {"intermediate_size": inner})

            def rms_run(rms=rms, rows=rows, hidden=hidden, weight=weight) -> Run:
                x = randn(rows, hidden)
                return lambda: rms(x, weight, 1e-6)

            def add_run(add=add, rows=rows, hidden=hidden, weight=weight) -> Run:
                x, y = randn(rows, hidden), randn(rows, hidden)
                return lambda: add(x, y, weight, 1e-6)

            def act_run(act=act, rows=rows, inner=inner) -> Run:
                x = randn(rows, 2 * inner)
                return lambda: act(x)

            for op, make, nbytes in (
                ("rms_norm", rms_run, 4 * rows * hidden),
                ("add_rms_norm", add_run, 8 * rows * hidden),
                ("silu_and_mul", act_run, 6 * rows * inner),
            ):
                us = tune.graph_time(rotated(nbytes, make))
                report("elementwise", f"{name} {op} x{rows}", us, nbytes)

            rope = kernel("rope_and_cache", rope_shape(name))
            norm = randn(dim) if name == "S" else None
            cos_sin = torch.rand(9000, dim, device=DEVICE)

            def rope_run(
                rope=rope, rows=rows, h=heads, kv=kv_heads, dim=dim, norm=norm, cs=cos_sin
            ) -> Run:
                qkv = randn(rows, (h + 2 * kv) * dim)
                k, v = (
                    torch.zeros(rows // 16 + 1, 16, kv, dim, dtype=BF16, device=DEVICE)
                    for _ in range(2)
                )
                positions = torch.arange(rows, device=DEVICE)
                slots = torch.randperm(rows, device=DEVICE)
                return lambda: rope(qkv, positions, cs, k, v, slots, h, kv, dim, False, norm, norm)

            nbytes = rows * (heads + 2 * kv_heads) * dim * 4
            report(
                "elementwise",
                f"{name} rope_and_cache x{rows}",
                tune.graph_time(rotated(nbytes, rope_run)),
                nbytes,
            )


def step() -> None:
    """What a decode step does around the model, beside torch's operations."""
    for name, (*_, vocab, _) in MODELS.items():
        for rows in (1, 32, 256):
            table = torch.randint(0, 99, (rows * 4096 + 4096,), dtype=torch.int32, device=DEVICE)
            blocks = torch.zeros(rows + 1, 64, dtype=torch.int32, device=DEVICE)
            which, places = torch.arange(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
            still = torch.zeros_like(places)
            ops = {
                "own": {op: kernel(op, {"vocab_size": vocab}) for op in STEP_OPS},
                "torch": {op: REFERENCES[op] for op in STEP_OPS},
            }

            def argmax_run(call, rows=rows, vocab=vocab, table=table, places=places) -> Run:
                logits = randn(rows, vocab)
                return lambda: call(logits, table, places)

            for kind, calls in ops.items():
                make = functools.partial(argmax_run, calls["argmax"])
                us = tune.graph_time(rotated(2 * rows * vocab, make), launches=16)
                report("step", f"{name} {kind} argmax x{rows}", us, 2 * rows * vocab)
                prepare = functools.partial(
                    calls["prepare_decode"], which, places, still, table, blocks, 4096, 16
                )
                us = tune.graph_time([prepare])
                report("step", f"{name} {kind} prepare_decode x{rows}", us, rows * 64 * 8)


STEP_OPS = ("prepare_decode", "argmax")
