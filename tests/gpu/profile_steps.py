"""Where the time of decode steps goes: one step's GPU kernels, the gaps before them, and the host.

    python3 tests/gpu/profile_steps.py S 1x128 32x960 host      shape, batches x prompt lengths

A row is one kind of kernel (name, grid, shared memory): how often it runs in a step, its mean time,
the time between the end of all kernels before it and its start (below zero where they overlap), and
both times count (`in a row`; these add up to the step).
"""

from __future__ import annotations

import cProfile
import io
import itertools
import json
import pstats
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import engine

from llmfw import LLM
from llmfw.engine.engine import LLMEngine
from llmfw_cli.bench.measure import Ours
from llmfw_cli.bench.workload import fixed

LAST = "argmax"  # the kernel that ends a step
STEPS = 10  # in which all requests decode
PROMPT_TOKENS = 8192  # of a step, as the engine's default is


@dataclass
class Kind:
    """Sums over a step's kernels of one name, grid and shared memory, in microseconds."""

    count: int = 0
    busy: float = 0.0
    gap: float = 0.0


def main() -> None:
    """Profile decoding at each point, then the host where asked for."""
    shape, *points = sys.argv[1:]
    sizes = [tuple(map(int, point.split("x"))) for point in points if point != "host"]
    with engine(shape, max_num_seqs=max(8, *(batch for batch, _ in sizes))) as (llm, _):
        for batch, length in sizes:
            ours = Ours(llm)
            reading = -(-batch * length // PROMPT_TOKENS) + 1  # steps until all requests decode
            new = reading + STEPS
            ours.run(fixed(batch, length, new, 10_000, 0))
            with profile(activities=[ProfilerActivity.CUDA]) as prof:
                ours.run(fixed(batch, length, new, 10_000, 1))
            print(f"== {shape} {batch} x {length}")
            show(kernels_of(prof), reading)
        if "host" in points:
            profile_host(llm, *sizes[-1])


def kernels_of(prof: Any) -> list[dict[str, Any]]:
    """All kernels and copies of a profile in the order of their starts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])


def show(events: list[dict[str, Any]], reading: int) -> None:
    """The median of the steps in which all requests decode, kind by kind."""
    ends = [i for i, event in enumerate(events) if LAST in event["name"]]
    ends = ends[reading : reading + STEPS - 2]
    steps = [events[a + 1 : b + 1] for a, b in itertools.pairwise(ends)]
    if not steps:
        print(f"no steps that end with {LAST}")
        return
    steps.sort(key=lambda step: step[-1]["ts"] - step[0]["ts"])
    step = steps[len(steps) // 2]
    kinds: dict[tuple[str, str], Kind] = defaultdict(Kind)
    end = step[0]["ts"]
    for event in step:
        facts = event["args"]
        shared = f"{facts.get('shared memory', 0) >> 10}K"
        kind = kinds[event["name"][:50], f"{facts.get('grid', '')} {shared}"]
        kind.count += 1
        kind.busy += event["dur"]
        kind.gap += event["ts"] - end
        end = max(end, event["ts"] + event["dur"])
    print(f"a step: {end - step[0]['ts']:.1f} us, {len(step)} kernels and copies")
    print(f"{'kernel':50} {'grid, shared memory':22} count   us each  gap before   in a row")
    for (name, grid), kind in sorted(kinds.items(), key=lambda item: -item[1].busy):
        each, gap = kind.busy / kind.count, kind.gap / kind.count
        total = kind.busy + kind.gap
        print(f"{name:50} {grid:22} {kind.count:5} {each:9.2f} {gap:11.2f} {total:10.1f}")


def profile_host(llm: LLM, batch: int, length: int) -> None:
    """The engine's thread under cProfile, through its own step function."""
    profiler = cProfile.Profile()
    step = LLMEngine._step

    def profiled(self: LLMEngine) -> None:
        profiler.enable()
        try:
            step(self)
        finally:
            profiler.disable()

    LLMEngine._step = profiled  # type: ignore[method-assign]
    try:
        Ours(llm).run(fixed(batch, length, 64, 10_000, 99))
    finally:
        LLMEngine._step = step  # type: ignore[method-assign]
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(28)
    print(text.getvalue())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
