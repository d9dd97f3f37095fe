"""Section of the benchmark: the ops of recurrent layers, for single tokens and for prompts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from gpu.bench_common import BF16, DEVICE, Run, kernel, randn, report, rotated
from llmfw.attention.metadata import AttentionMetadata
from llmfw.kernels.cupy import tune
from llmfw.ops.reference import REFERENCES

Call = Callable[..., Any]
# model: op, shape
SHAPES: dict[str, list[tuple[str, dict[str, int]]]] = {
    "mamba2-2.7b": [
        ("causal_conv1d", {"channels": 5376, "kernel_size": 4}),
        ("ssd_scan", {"num_heads": 80, "head_dim": 64, "num_groups": 1, "state_size": 128}),
    ],
    "codestral-mamba-7b": [
        ("causal_conv1d", {"channels": 10240, "kernel_size": 4}),
        ("ssd_scan", {"num_heads": 128, "head_dim": 64, "num_groups": 8, "state_size": 128}),
    ],
    "falcon-mamba-7b": [
        ("causal_conv1d", {"channels": 8192, "kernel_size": 4}),
        ("selective_scan", {"channels": 8192, "state_size": 16}),
    ],
}
BATCHES = {"1": (1,), "8": (1,) * 8, "64": (1,) * 64, "256": (1,) * 256}
PROMPTS = {"1 x 2048": (2048,), "8 x 512": (512,) * 8}


def recurrent() -> None:
    """Single tokens beside the bytes of state, prompts beside the reference."""
    for model, ops in SHAPES.items():
        for op, shape in ops:
            call = kernel(op, shape)
            for label, lens in {**BATCHES, **PROMPTS}.items():
                make = functools.partial(run_of, call, op, shape, lens)
                nbytes = bytes_of(op, shape, lens)
                us = tune.graph_time(rotated(nbytes, make), launches=48 if max(lens) == 1 else 4)
                facts: dict[str, Any] = {}
                if max(lens) > 1 and len(lens) == 1:
                    facts["reference_us"] = round(eager_time(op, shape, lens), 1)
                report("recurrent", f"{model} {op} {label}", us, nbytes, **facts)
                torch.cuda.empty_cache()
            if op == "ssd_scan":
                chunks(model, shape)


def chunks(model: str, shape: dict[str, int]) -> None:
    """Prompts by products within chunks."""
    call = kernel("ssd_scan", shape, "cupy.ssd_chunks")
    for label, lens in PROMPTS.items():
        make = functools.partial(run_of, call, "ssd_scan", shape, lens)
        nbytes = bytes_of("ssd_scan", shape, lens)
        us = tune.graph_time(rotated(nbytes, make), launches=4)
        report("recurrent", f"{model} ssd_chunks {label}", us, nbytes)
        torch.cuda.empty_cache()


def metadata_of(lens: tuple[int, ...]) -> AttentionMetadata:
    """A batch of such requests, each in the slot of its number."""
    ends = torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32).to(DEVICE)
    return AttentionMetadata(
        query_lens=lens,
        kv_lens=lens,
        num_contexts=0,
        cu_query_lens=ends,
        kv_lens_device=ends[1:],
        positions=ends[1:],
        groups=(),
        caches={},
        max_query_len=max(lens),
        max_kv_len=max(lens),
        state_slots=torch.arange(len(lens), device=DEVICE),
    )


def arguments_of(op: str, shape: dict[str, int], lens: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments of one call, as a layer of the model gives them."""
    tokens, metadata = sum(lens), metadata_of(lens)
    if op == "causal_conv1d":
        channels, taps = shape["channels"], shape["kernel_size"]
        state = randn(len(lens), taps - 1, channels)
        x = randn(tokens, 2 * channels)[:, :channels]
        return x, randn(channels, taps), randn(channels), state, metadata
    size = shape["state_size"]
    if op == "selective_scan":
        channels = shape["channels"]
        a = -torch.rand(channels, size, device=DEVICE)
        d, dt_bias = (torch.randn(channels, device=DEVICE) for _ in range(2))
        x, z = randn(tokens, 2 * channels).chunk(2, dim=-1)
        dt = randn(tokens, channels)
        b, c = randn(tokens, 2 * size).chunk(2, dim=-1)
        state = torch.randn(len(lens), channels, size, device=DEVICE)
        return x.contiguous(), dt, a, b, c, d, z, dt_bias, state, metadata
    heads, head_dim, groups = shape["num_heads"], shape["head_dim"], shape["num_groups"]
    a = -torch.rand(heads, device=DEVICE)
    d, dt_bias = (torch.randn(heads, device=DEVICE) for _ in range(2))
    widths = (heads * head_dim, groups * size, groups * size)
    x, b, c = randn(tokens, sum(widths)).split(widths, dim=-1)
    b, c = (part.unflatten(1, (groups, size)) for part in (b, c))
    x = x.unflatten(1, (heads, head_dim))
    state = torch.randn(len(lens), heads, head_dim, size, device=DEVICE)
    dt = randn(tokens, heads)
    return x, dt, a, b, c, d, dt_bias, (0.0, math.inf), state, metadata


def run_of(call: Call, op: str, shape: dict[str, int], lens: tuple[int, ...]) -> Run:
    """A call with buffers of its own."""
    arguments = arguments_of(op, shape, lens)
    return lambda: call(*arguments)


def bytes_of(op: str, shape: dict[str, int], lens: tuple[int, ...]) -> float:
    """State read and written, inputs read and results written, weights read."""
    tokens, width = sum(lens), torch.finfo(BF16).bits // 8
    if op == "causal_conv1d":
        channels, taps = shape["channels"], shape["kernel_size"]
        return width * channels * (2 * tokens + 2 * len(lens) * (taps - 1) + taps + 1)
    size = shape["state_size"]
    if op == "selective_scan":
        channels = shape["channels"]
        state = 8 * len(lens) * channels * size
        return state + 4 * channels * size + width * tokens * (4 * channels + 2 * size)
    inner = shape["num_heads"] * shape["head_dim"]
    rows = 2 * inner + 2 * shape["num_groups"] * size + shape["num_heads"]
    return 8 * len(lens) * inner * size + width * tokens * rows


def eager_time(op: str, shape: dict[str, int], lens: tuple[int, ...]) -> float:
    """Microseconds of the reference, which copies indices from the host."""
    run = run_of(REFERENCES[op], op, shape, lens)
    best = math.inf
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000)
    return best
