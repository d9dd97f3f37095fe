"""What parts of a decode step draw: watts and clocks beside steady loops of one kind of kernel.

    python3 tests/gpu/power.py L 256        shape, requests of KEYS keys

A line has the microseconds of a layer, those of a replay with the multiprocessors' cycles a
microsecond (what they really run at: nvidia-smi's clock is the one asked for) and what nvidia-smi
told last. Below a layer's kernels are the times and cycles of each.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cupy
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.bench_attention import decode_caches, decode_runs
from gpu.bench_common import COPIED, MODELS, attention_shape, context_of, kernel, randn
from llmfw.kernels.cupy.paged_decode import PagedDecode

KEYS = 992
SECONDS = 1.0
MARKS = 64
ALL_SHARED = 200 << 10  # bytes of shared memory of a block that has a multiprocessor for itself
MARK = r"""
extern "C" __global__ void mark(long long* at) {
  extern __shared__ char whole[];
  unsigned multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  if (threadIdx.x) return;
  at[2 * multiprocessor] = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(at[2 * multiprocessor + 1]));
}"""
FACTS = "power.draw.instant,power.draw.average,clocks.sm,clocks.mem,temperature.gpu"


def told() -> str:
    """FACTS of the GPU now."""
    command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Marks:
    """Places in a graph, and the cycles and nanoseconds of every multiprocessor there."""

    def __init__(self) -> None:
        self._kernel = cupy.RawKernel(MARK, "mark")
        self._kernel.max_dynamic_shared_size_bytes = ALL_SHARED
        self._sms = torch.cuda.get_device_properties(0).multi_processor_count
        self._at = torch.zeros(MARKS, self._sms, 2, dtype=torch.int64, device="cuda")
        self.count = 0

    def add(self) -> None:
        """A place here."""
        address = np.int64(self._at[self.count].data_ptr())
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self._kernel((self._sms,), (32,), (address,), shared_mem=ALL_SHARED)
        self.count += 1

    def between(self, first: int, last: int) -> str:
        """Microseconds and cycles a microsecond from one place to another, as `us @ MHz`."""
        at = self._at.cpu()
        seen = (at[first, :, 1] > 0) & (at[last, :, 1] > 0)
        cycles, ns = (at[last] - at[first])[seen].unbind(1)
        return f"{ns.median() / 1000:.1f} @ {(cycles / ns).median() * 1000:.0f}"


def steady(label: str, run: Callable[[Marks], object], layers: int, parts: int = 0) -> None:
    """Replay a graph of `run` for SECONDS; print the time of a layer in the last part of it."""
    marks = Marks()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(marks)
        marks.count = 0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        marks.add()
        run(marks)
        marks.add()
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
    clock = marks.between(0, marks.count - 1)
    print(f"{label:40} {us:8.2f} us a layer  all {clock}  {FACTS} {seen[-1]}", flush=True)
    if parts:  # of the last layer
        first = marks.count - 2 - parts
        print(*(marks.between(first + i, first + i + 1) for i in range(parts)), sep="  ")


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
    gated = {"in_features": hidden, "intermediate_size": inner, "bias": 0}
    products = {
        key: kernel("gated_linear", gated)
        if key == "gate_up"
        else kernel("linear", {"in_features": into, "out_features": out, "bias": 0})
        for key, (into, out) in sizes.items()
    }
    ways = {
        kind: decode_runs(PagedDecode(context, copied), caches, tables, q, KEYS, None)
        for kind, copied in (("tensor copies", True), ("registers", False))
        if COPIED or not copied
    }

    def product(key: str, weight: dict[str, torch.Tensor]) -> None:
        products[key](x[key], weight[key])

    gigabyte = torch.empty(1 << 27, dtype=torch.int64, device="cuda")
    print("idle", told())
    steady("reading 1 GB", lambda _: torch.sum(gigabyte), 1)
    for way, runs in ways.items():
        steady(f"attention, {way}", lambda _, runs=runs: [run() for run in runs], layers)
    for key in sizes:
        steady(key, lambda _, key=key: [product(key, weight) for weight in weights], layers)
    steady("all products", lambda _: [product(key, w) for w in weights for key in sizes], layers)

    def layer(
        attend: Callable[[], object], weight: dict[str, torch.Tensor], mark: Callable[[], None]
    ) -> None:
        product("qkv", weight)
        mark()
        attend()
        mark()
        for key in ("o", "gate_up", "down"):
            product(key, weight)
            mark()

    for way, runs in ways.items():
        pairs = list(zip(runs, weights, strict=True))
        for kind, parts in (("a layer", 0), ("a layer's kernels", 5)):

            def run(marks: Marks, pairs=pairs, parts=parts) -> None:
                for pair in pairs:
                    layer(*pair, marks.add if parts else lambda: None)

            steady(f"{kind}, {way}", run, layers, parts)


if __name__ == "__main__":
    main()
