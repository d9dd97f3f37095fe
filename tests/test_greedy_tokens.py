"""Greedy tokens through `LLM` equal transformers': tiny models, and the real SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from llmfw import LLM, SamplingParams
from llmfw.weights import resolve_model
from parity import (
    REAL_TIE,
    TINY_TIE,
    assert_greedy,
    random_prompts,
    tiny_hf,
)

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
TINY = {
    "LlamaForCausalLM": LlamaConfig(**BASE, tie_word_embeddings=True),
    "MistralForCausalLM": MistralConfig(**BASE, sliding_window=12, head_dim=16),
    "Qwen2ForCausalLM": Qwen2Config(**BASE),
    "Qwen3ForCausalLM": Qwen3Config(**BASE, head_dim=32),
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees, and freezes at",
    "The three primary colours are",
    "In 1969 the first people",
    "A recipe for bread: take 500 g of flour,",
    "Photosynthesis is the process by which",
    "Q: What is 12 times 12?\nA:",
    "The quick brown fox",
]


@pytest.mark.parametrize("architecture", TINY)
def test_32_greedy_tokens_on_20_prompts(architecture: str, tmp_path: Path):
    hf = tiny_hf(TINY[architecture], architecture)
    hf.save_pretrained(tmp_path)
    prompts = random_prompts(20, 128, 1, 60)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    with LLM(tmp_path, skip_tokenizer_init=True, block_size=8, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(hf, prompt, list(output.outputs[0].token_ids), TINY_TIE)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_model("smollm2").model_dir


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_smollm2_64_greedy_tokens_on_10_prompts(smollm2: Path, kernels: str):
    hf = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM("smollm2", dtype="float32", kernels=kernels, generation_config="none") as llm:
        outputs = llm.generate(PROMPTS, params)
    assert llm.loaded.model_config.dtype == torch.float32
    for output in outputs:
        got = list(output.outputs[0].token_ids)
        assert len(got) == 64
        assert_greedy(hf, list(output.prompt_token_ids), got, REAL_TIE)
    texts = [output.outputs[0].text for output in outputs]
    assert "Paris" in texts[0]
