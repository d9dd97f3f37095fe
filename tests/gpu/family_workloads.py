"""Decode speed of families' shapes with random weights on a GPU, beside the bandwidth floor.

    python3 tests/gpu/family_workloads.py OUT.json [NAME ...]

The floor is the time to read what a step needs: weights (of the experts that random routing is
expected to choose), K and V. Prompts of 128, 64 new tokens, batches of 1 and 64.
"""

from __future__ import annotations

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
PROMPT, NEW = 128, 64
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16",
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    },
}


def seconds(llm: LLM, batch: int, new: int) -> float:
    """The time of a whole run."""
    prompts = [[random.randrange(10000) for _ in range(PROMPT)] for _ in range(batch)]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
    assert all(len(out.outputs[0].token_ids) == new for out in outputs)
    return time.perf_counter() - begin


def step_seconds(llm: LLM, batch: int) -> float:
    """A decode step: the difference of a long and a short run, so that prefill falls out."""
    seconds(llm, batch, 4)
    short = statistics.median(seconds(llm, batch, NEW // 2) for _ in range(3))
    long = statistics.median(seconds(llm, batch, NEW) for _ in range(3))
    return (long - short) / (NEW - NEW // 2)


def floor_seconds(llm: LLM, config: dict[str, Any], batch: int) -> float:
    """Time to read a step's weights, keys and values once."""
    experts = config.get("num_experts") or config.get("n_routed_experts", 0)
    chosen = config.get("num_experts_per_tok", 0)
    share = 1 - (1 - chosen / experts) ** batch if experts else 1.0
    nbytes = 0.0
    for name, parameter in llm.loaded.model.named_parameters():
        untied = "embed_tokens" not in name or config.get("tie_word_embeddings", not experts)
        if untied:
            nbytes += parameter.nbytes * (share if ".experts." in name else 1.0)
    cached = sum(spec.bytes_per_token for spec in llm.loaded.model.cache_specs().values())
    nbytes += cached * batch * (PROMPT + 0.75 * NEW)
    return nbytes / READ


def main() -> None:
    """Run the shapes that are named, all by default, and write JSON."""
    out, *names = sys.argv[1:]
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in names or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
            llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=1024,
                max_num_seqs=64,
                enable_prefix_caching=False,
            )
        with llm:
            choices = llm.loaded.model_config.ops.choices.values()
            print(name, sorted({f"{c.context.op}={c.chosen}" for c in choices}), flush=True)
            for batch in (1, 64):
                step = 1e3 * step_seconds(llm, batch)
                floor = 1e3 * floor_seconds(llm, SHAPES[name], batch)
                row = {"step_ms": step, "floor_ms": floor, "tokens_per_s": 1e3 * batch / step}
                results[f"{name} batch {batch}"] = row
                print(name, batch, {key: round(value, 2) for key, value in row.items()}, flush=True)
        del llm
        torch.cuda.empty_cache()
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
