"""Qwen2 and Qwen3 against transformers, on tiny random configurations that cover their switches."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config

from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "window": WINDOW,
    "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_qwen2(case: str):
    hf = tiny_hf(Qwen2Config(**{**BASE, **CASES[case]}), "Qwen2ForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 10, 60))


@pytest.mark.parametrize("case", [*CASES, "attention_bias"])
def test_against_hf_qwen3(case: str):
    extra = {"attention_bias": True} if case == "attention_bias" else CASES[case]
    hf = tiny_hf(Qwen3Config(**{**BASE, "head_dim": 32, **extra}), "Qwen3ForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 10, 60))
