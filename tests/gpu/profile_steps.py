"""Where the time of a step goes: GPU kernels by name, and what the host does, for one shape.

python3 tests/gpu/profile_steps.py S 1 128      shape, batch, prompt length
"""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import engine

from llmfw import LLM
from llmfw.engine.engine import LLMEngine
from llmfw_cli.bench.measure import Ours
from llmfw_cli.bench.workload import fixed


def main() -> None:
    """Profile a prefill alone, then decoding alone, then the host."""
    shape, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with engine(shape, max_num_seqs=max(8, batch)) as (llm, _):
        for number, (name, new) in enumerate((("prefill", 1), ("decode", 40))):
            load = [fixed(batch, length, new, 10_000, 3 * number + seed) for seed in range(3)]
            ours = Ours(llm)
            ours.run(load[0])
            begin = time.perf_counter()
            ours.run(load[1])
            print(f"== {name}: {1e3 * (time.perf_counter() - begin):.2f} ms unprofiled")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
                ours.run(load[2])
            events = prof.key_averages()
            print(
                events.table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)
            )
        profile_host(llm, batch, length)


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
