"""The workloads of docs/benchmarks.md on a GPU, in one engine a shape: `llmfw bench`'s own parts.

    python3 tests/gpu/workloads.py OUT.json S:W1 S:W2 S:Wb S:W3 L:W1 cuda_graphs=false ...
    python3 tests/gpu/workloads.py OUT.json qwen3-30b-a3b:Wf gemma-3-4b:Wf

S and L are the shapes of Qwen3-0.6B and Llama-3.1-8B, other names those of files in
docs/benchmarks/shapes. W1: batch 1, prompt 128, 128 new tokens. W2: batch 32, prompt 960, 128 new.
Wb: batch 1, 8, 64 and 256, prompt 960, 64 new. Wf: batch 1 and 64, prompt 128, 64 new.
W3: 256 (L: the first 128 of them) requests whose prompts and outputs have 100 to 1,024 tokens.
P8: prefill of 8 prompts of 2,048 tokens. Words with an equals sign are keywords of `LLM`, in JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmfw import LLM
from llmfw_cli.bench.lengths import parse_lengths
from llmfw_cli.bench.machine import matrix_rate
from llmfw_cli.bench.measure import Ours, rounded
from llmfw_cli.bench.steps import StepBench
from llmfw_cli.bench.workload import draw_workload

READ = 3.12e12  # bytes a second: the floors of docs/benchmarks.md
SHAPES = Path(__file__).parents[2] / "docs" / "benchmarks" / "shapes"
NAMES = {"S": "qwen3-0.6b", "L": "llama-3.1-8b"}
DECODE = {  # workload: batch and new tokens of each point, prompt, timed runs
    "W1": (((1, 128),), 128, 5),
    "W2": (((32, 128),), 960, 3),
    "Wb": (((1, 64), (8, 64), (64, 64), (256, 64)), 960, 3),
    "Wf": (((1, 64), (64, 64)), 128, 3),
}


@contextmanager
def engine(shape: str, **settings: Any):
    """An engine of random weights of a shape, and the seconds until it was ready."""
    config = SHAPES / f"{NAMES.get(shape, shape)}.json"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config.read_text())
        begin = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            enable_prefix_caching=False,
            **settings,
        )
        ready = time.perf_counter() - begin
    with llm:
        yield llm, ready
    del llm
    gc.collect()
    torch.cuda.empty_cache()


def measure(llm: LLM, shape: str, work: str) -> Any:
    """One workload's figures."""
    vocab, device = llm.loaded.model.vocab_size, llm.loaded.model_config.device
    if work in DECODE:
        points, prompt, runs = DECODE[work]
        bench = StepBench(llm, vocab, runs=runs)
        found = [
            asdict(next(bench.decode((batch,), (prompt,), new, READ))) for batch, new in points
        ]
        return found[0] if len(found) == 1 else found
    if work == "P8":
        rate = matrix_rate(device, llm.loaded.model_config.dtype)
        return asdict(next(StepBench(llm, vocab).prefill(8, (2048,), rate)))
    assert work == "W3", work
    lengths = parse_lengths("100..1024")
    load = draw_workload(256, lengths, lengths, vocab, seed=0).first(128 if shape == "L" else 256)
    ours = Ours(llm)
    ours.run(load.first(1))
    seconds = ours.run(load).total_s
    tokens = load.total_new_tokens
    return {"output_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def main() -> None:
    """Run what the command line names and write JSON after every shape."""
    out, *wanted = sys.argv[1:]
    settings = dict(word.split("=") for word in wanted if "=" in word)
    settings = {key: json.loads(value) for key, value in settings.items()}
    works: dict[str, list[str]] = {}
    for item in (word for word in wanted if ":" in word):
        shape, _, work = item.partition(":")
        works.setdefault(shape, []).append(work)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= settings
    for shape, names in works.items():
        with engine(shape, **settings) as (llm, ready):
            choices = llm.loaded.model_config.ops.choices.values()
            found: dict[str, Any] = {"ready_s": ready, "startup_s": llm.startup_seconds}
            found["kernels"] = sorted({f"{c.context.op}={c.chosen}" for c in choices})
            results[shape] = found
            for work in names:
                found[work] = measure(llm, shape, work)
                print(shape, work, json.dumps(rounded(found[work])), flush=True)
                Path(out).write_text(json.dumps(rounded(results), indent=1))
    print(json.dumps(rounded(results))[:3000])


if __name__ == "__main__":
    main()
