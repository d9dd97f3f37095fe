"""Gemma 1, 2 and 3 against transformers, on tiny random configurations that cover switches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
)

from llmfw import ConfigError
from parity import assert_same_logits, ours_from, published, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
GEMMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "mqa": {"num_key_value_heads": 1},
    "gelu_of_old_configs": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "eps": {"rms_norm_eps": 1e-2},
}
WINDOW = {"sliding_window": 9}
GEMMA2: dict[str, dict[str, Any]] = {
    "plain": WINDOW,
    "scale": {**WINDOW, "query_pre_attn_scalar": 16},
    "caps": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "no_caps": {**WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "no_window": {"layer_types": ["full_attention"] * 3},
}
FULL = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
ROPES = {"full_attention": FULL, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
GEMMA3: dict[str, dict[str, Any]] = {
    "plain": {**WINDOW, "sliding_window_pattern": 3},
    "ropes": {**WINDOW, "sliding_window_pattern": 2, "rope_parameters": ROPES},
    "scale": {**WINDOW, "query_pre_attn_scalar": 16},
    "caps": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "untied": {**WINDOW, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", GEMMA)
def test_against_hf_gemma(case: str):
    hf = tiny_hf(GemmaConfig(**{**BASE, **GEMMA[case]}), "GemmaForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


@pytest.mark.parametrize("case", GEMMA2)
def test_against_hf_gemma2(case: str):
    hf = tiny_hf(Gemma2Config(**{**BASE, **GEMMA2[case]}), "Gemma2ForCausalLM", "eager")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


@pytest.mark.parametrize("case", GEMMA3)
def test_against_hf_gemma3(case: str):
    hf = tiny_hf(Gemma3TextConfig(**{**BASE, **GEMMA3[case]}), "Gemma3ForCausalLM", "eager")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


def with_vision() -> Gemma3Config:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config={**BASE, **WINDOW}, vision_config=vision, eos_token_id=None)


@pytest.mark.parametrize("layout", ["memory", "published"])
def test_against_hf_gemma3_text_part(layout: str, tmp_path: Path):
    hf = tiny_hf(with_vision(), "Gemma3ForConditionalGeneration", "eager")
    checkpoint = published(hf, tmp_path) if layout == "published" else None
    if checkpoint is not None:
        assert "language_model.model.norm.weight" in checkpoint.names()
    assert_same_logits(hf, ours_from(hf, checkpoint=checkpoint), random_prompts(3, 128, 8, 60))


def test_a_model_that_attends_in_both_directions_is_refused():
    config = Gemma3TextConfig(**{**BASE, **WINDOW}, use_bidirectional_attention=True)
    hf = tiny_hf(config, "Gemma3ForCausalLM", "eager")
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        ours_from(hf)
