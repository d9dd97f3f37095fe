"""Phi and Phi-3 against transformers, on tiny random configurations that cover their switches."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Phi3Config, PhiConfig

from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
PHI: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "quarter_rotated": {"partial_rotary_factor": 0.25},
    "qk_layernorm": {"qk_layernorm": True},
    "gelu": {"hidden_act": "gelu"},
    "eps": {"layer_norm_eps": 1e-2},
}
ORIGINAL = 64


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + i for i in range(pairs)],
    }


PHI3: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "window": {"sliding_window": 9},
    "partly_rotated": {"partial_rotary_factor": 0.75},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("case", PHI)
def test_against_hf_phi(case: str):
    hf = tiny_hf(PhiConfig(**{**BASE, **PHI[case]}), "PhiForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


@pytest.mark.parametrize("case", PHI3)
def test_against_hf_phi3(case: str):
    hf = tiny_hf(Phi3Config(**{**BASE, **PHI3[case]}), "Phi3ForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


@pytest.mark.parametrize("partial", [1.0, 0.75])
@pytest.mark.parametrize("length", [ORIGINAL, 256])
def test_against_hf_phi3_longrope(length: int, partial: float):
    """Factors by the engine's longest sequence: the short ones up to the original length."""
    config = Phi3Config(
        **BASE,
        rope_scaling=longrope(int(8 * partial)),
        partial_rotary_factor=partial,
        original_max_position_embeddings=ORIGINAL,
    )
    hf = tiny_hf(config, "Phi3ForCausalLM")
    low, high = (20, ORIGINAL) if length == ORIGINAL else (ORIGINAL + 1, 120)
    assert_same_logits(hf, ours_from(hf, max_model_len=length), random_prompts(3, 128, low, high))
