"""What parts of a decode step draw: watts and clocks beside steady loops of one kind of kernel.

    python3 tests/gpu/power.py L 256        shape, requests of KEYS keys

A line has the microseconds of a layer and what nvidia-smi told last.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.bench_attention import decode_caches, decode_runs
from gpu.bench_common import COPIED, MODELS, attention_shape, context_of, kernel, randn
from llmfw.kernels.cupy.paged_decode import PagedDecode

KEYS = 992
SECONDS = 2.0
FACTS = "power.draw.instant,power.draw.average,clocks.sm,clocks.mem,temperature.gpu"


def told() -> str:
    """FACTS of the GPU now."""
    command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def steady(label: str, run: Callable[[], object], layers: int) -> None:
    """Replay a graph of `run` for SECONDS; print the time of a layer in the last part of it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        run()
        graph.capture_end()
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(told())

    watcher = threading.Thread(target=watch)
    watcher.start()
    us = 0.0
    for seconds in (SECONDS * 0.7, SECONDS * 0.3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start, replays = time.perf_counter(), 0
        begin.record()
        while time.perf_counter() - start < seconds:
            graph.replay()
            replays += 1
            end.record()
            end.synchronize()
        us = begin.elapsed_time(end) * 1000 / replays / layers
    done.set()
    watcher.join()
    print(f"{label:40} {us:8.2f} us a layer   {FACTS} {seen[-1]}", flush=True)


def main() -> None:
    """All parts, and whole layers."""
    name, batch = sys.argv[1], int(sys.argv[2])
    hidden, inner, heads, kv_heads, dim, _, _ = MODELS[name]
    layers = 4 if hidden > 2048 else 12
    caches, tables = decode_caches(batch, KEYS, kv_heads, dim, layers)
    q, context = randn(batch, heads, dim), context_of("paged_attention", attention_shape(name))
    sizes = {
        "qkv": (hidden, (heads + 2 * kv_heads) * dim),
        "o": (heads * dim, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    weights = [{key: randn(out, into) * 0.02 for key, (into, out) in sizes.items()} for _ in caches]
    x = {key: randn(batch, into) for key, (into, _) in sizes.items()}
    gated = kernel("gated_linear", {"in_features": hidden, "intermediate_size": inner, "bias": 0})
    ways = {
        kind: decode_runs(PagedDecode(context, copied), caches, tables, q, KEYS, None)
        for kind, copied in (("tensor copies", True), ("registers", False))
        if COPIED or not copied
    }

    def product(key: str, weight: dict[str, torch.Tensor]) -> None:
        if key == "gate_up":
            gated(x[key], weight[key])
        else:
            F.linear(x[key], weight[key])

    gigabyte = torch.empty(1 << 27, dtype=torch.int64, device="cuda")
    print("idle", told())
    steady("reading 1 GB", lambda: torch.sum(gigabyte), 1)
    for way, runs in ways.items():
        steady(f"attention, {way}", lambda runs=runs: [run() for run in runs], layers)
    for key in sizes:
        steady(key, lambda key=key: [product(key, weight) for weight in weights], layers)
    steady("all products", lambda: [product(key, w) for w in weights for key in sizes], layers)

    def layer(attend: Callable[[], object], weight: dict[str, torch.Tensor]) -> None:
        product("qkv", weight)
        attend()
        for key in ("o", "gate_up", "down"):
            product(key, weight)

    for way, runs in ways.items():
        pairs = list(zip(runs, weights, strict=True))
        steady(f"a layer, {way}", lambda pairs=pairs: [layer(*pair) for pair in pairs], layers)


if __name__ == "__main__":
    main()
