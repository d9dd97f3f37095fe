"""End-to-end decode and throughput on a GPU with random weights, as docs/benchmarks.md tells.

    python3 tests/gpu/workloads.py OUT.json S:W1 S:W2 S:Wb S:W3 L:W1 cuda_graphs=false ...

S is Qwen3-0.6B's shape, L Llama-3.1-8B's. W1: batch 1, prompt 128, 128 new tokens. W2: batch 32,
prompt 960, 128 new. Wb: batch 1, 8, 64 and 256, prompt 960, 64 new (128 at 256). W3: 256 (S) or
128 (L) requests whose prompts and outputs have 100 to 1,024 tokens. End-of-sequence tokens are
ignored, and the number of tokens that came is checked. Words with an equals sign are keywords of
`LLM`, in JSON.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmfw import LLM, SamplingParams

READ = 3.12e12  # bytes a second, measured read bandwidth of an H100

SHAPES: dict[str, dict[str, Any]] = {
    "S": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
    "L": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
    },
}
WEIGHTS = {"S": 1.192e9, "L": 15.010e9}
KV = {"S": 114688, "L": 131072}


def prompts(count: int, length: int) -> list[list[int]]:
    """Random prompts of one length, no two alike."""
    return [[random.randrange(10000) for _ in range(length)] for _ in range(count)]


def generate(llm: LLM, ids: list[list[int]], new: int) -> tuple[float, float]:
    """Seconds of a whole run, and of the first token of any request."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    begin = time.perf_counter()
    outputs = llm.generate(ids, params)
    seconds = time.perf_counter() - begin
    assert all(len(out.outputs[0].token_ids) == new for out in outputs)
    return seconds, min(out.timings.first_token for out in outputs) - begin


def decode(llm: LLM, shape: str, batch: int, length: int, new: int, runs: int = 5) -> dict:
    """Milliseconds a step, beside the floor: the difference of runs of `new` and `new` / 2 tokens.

    The difference is free of prefill, and of requests that decode while others are still read.
    """
    generate(llm, prompts(batch, length), 8)
    steps, firsts = [], []
    for _ in range(runs):
        short, first = generate(llm, prompts(batch, length), new // 2)
        long, _ = generate(llm, prompts(batch, length), new)
        steps.append((long - short) / (new - new // 2))
        firsts.append(first)
    floor = (WEIGHTS[shape] + batch * (length + 0.75 * new) * KV[shape]) / READ
    return {
        "batch": batch,
        "floor_ms": 1e3 * floor,
        "step_ms": 1e3 * statistics.median(steps),
        "first_ms": 1e3 * statistics.median(firsts),
        "runs": runs,
    }


def throughput(llm: LLM, shape: str) -> dict:
    """The community's yardstick: all requests at once, lengths uniform in 100..1024."""
    rng = random.Random(0)
    count = 256
    ids = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(count)]
    news = [rng.randint(100, 1024) for _ in range(count)]
    if shape == "L":
        ids, news = ids[:128], news[:128]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in news]
    llm.generate(ids[:1], params[:1])
    begin = time.perf_counter()
    outputs = llm.generate(ids, params)
    seconds = time.perf_counter() - begin
    made = sum(len(out.outputs[0].token_ids) for out in outputs)
    assert made == sum(news)
    return {"output_tokens": made, "seconds": seconds, "tokens_per_s": made / seconds}


def run(shape: str, works: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """All workloads of one shape in one engine."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        begin = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            enable_prefix_caching=False,
            **settings,
        )
        result["ready_s"] = time.perf_counter() - begin
    with llm:
        choices = llm.loaded.model_config.ops.choices.values()
        result["kernels"] = sorted({f"{c.context.op}={c.chosen}" for c in choices})
        for work in works:
            if work == "W1":
                result[work] = decode(llm, shape, 1, 128, 128)
            elif work == "W2":
                result[work] = decode(llm, shape, 32, 960, 128, runs=3)
            elif work == "Wb":
                result[work] = [
                    decode(llm, shape, b, 960, 64 if b < 256 else 128, runs=2)
                    for b in (1, 8, 64, 256)
                ]
            elif work == "W3":
                result[work] = throughput(llm, shape)
            print(shape, work, json.dumps(result[work]), flush=True)
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return result


def main() -> None:
    """Run what the command line names and write JSON."""
    out, *wanted = sys.argv[1:]
    settings = dict(w.split("=") for w in wanted if "=" in w)
    settings = {key: json.loads(value) for key, value in settings.items()}
    works: dict[str, list[str]] = {}
    for item in (w for w in wanted if ":" in w):
        shape, _, work = item.partition(":")
        works.setdefault(shape, []).append(work)
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **settings}
    for shape, names in works.items():
        results[shape] = run(shape, names, settings)
        Path(out).write_text(json.dumps(results, indent=1))
    print(json.dumps(results)[:3000])


if __name__ == "__main__":
    main()
