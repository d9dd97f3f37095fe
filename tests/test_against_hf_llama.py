"""LLaMA and Mistral against transformers, on tiny random configurations that cover switches."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        }
    },
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_llama(case: str):
    hf = tiny_hf(LlamaConfig(**{**BASE, **CASES[case]}), "LlamaForCausalLM")
    past_the_original = [random_prompts(1, 128, 100, 100)[0], *random_prompts(3, 128, 1, 20)]
    assert_same_logits(hf, ours_from(hf), past_the_original)


def test_against_hf_llama_longrope_short_engine():
    hf = tiny_hf(LlamaConfig(**BASE, rope_parameters=LONGROPE), "LlamaForCausalLM")
    prompts = random_prompts(3, 128, 20, ORIGINAL)
    assert_same_logits(hf, ours_from(hf, max_model_len=ORIGINAL), prompts)


def test_against_hf_llama_longrope_long_engine():
    """A whole forward past the original length; the engine's factors are the long ones."""
    hf = tiny_hf(LlamaConfig(**BASE, rope_parameters=LONGROPE), "LlamaForCausalLM")
    prompts = random_prompts(2, 128, ORIGINAL + 1, 120)
    assert_same_logits(hf, ours_from(hf, max_model_len=256), prompts)


def test_against_hf_llama_dynamic_past_its_length():
    """transformers scales by the forward's length, the engine by its longest sequence."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    short = {**BASE, "max_position_embeddings": ORIGINAL}
    hf = tiny_hf(LlamaConfig(**short, rope_parameters=rope), "LlamaForCausalLM")
    prompts = random_prompts(2, 128, 100, 100)
    assert_same_logits(hf, ours_from(hf, max_model_len=100), prompts)


@pytest.mark.parametrize("window", [None, 5, 16, 300])
def test_against_hf_mistral(window: int | None):
    hf = tiny_hf(MistralConfig(**BASE, sliding_window=window, head_dim=16), "MistralForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 10, 60))
