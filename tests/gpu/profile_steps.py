"""Where the time of a step goes: GPU kernels by name, and what the host does, for one shape.

python3 tests/gpu/profile_steps.py S 1 128      shape, batch, prompt length
"""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import SHAPES, prompts

from llmfw import LLM, SamplingParams


def main() -> None:
    """Profile a prefill alone, then decoding alone."""
    shape, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            enable_prefix_caching=False,
            max_num_seqs=max(8, batch),
        )
    with llm:
        for name, new in (("prefill", 1), ("decode", 40)):
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            llm.generate(prompts(batch, length), params)
            begin = time.perf_counter()
            llm.generate(prompts(batch, length), params)
            print(f"== {name}: {1e3 * (time.perf_counter() - begin):.2f} ms unprofiled")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
                llm.generate(prompts(batch, length), params)
            events = prof.key_averages()
            print(
                events.table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)
            )
    _profile_host(shape, batch, length)


def _profile_host(shape: str, batch: int, length: int) -> None:
    """The engine's thread under cProfile, through its own step function."""
    from llmfw.engine.engine import LLMEngine

    profiler = cProfile.Profile()
    step = LLMEngine._step

    def profiled(self: LLMEngine) -> None:
        profiler.enable()
        try:
            step(self)
        finally:
            profiler.disable()

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            enable_prefix_caching=False,
            max_num_seqs=max(8, batch),
        )
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with llm:
        llm.generate(prompts(batch, length), params)
        LLMEngine._step = profiled  # type: ignore[method-assign]
        llm.generate(prompts(batch, length), params)
        LLMEngine._step = step  # type: ignore[method-assign]
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(28)
    print(text.getvalue())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
