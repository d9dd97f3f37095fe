"""Qwen2 and Qwen3 against transformers, on tiny random configurations that cover their switches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from parity import assert_same_logits, ours_from, published, random_prompts, tiny_hf

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


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "renormalized": {"norm_topk_prob": True},
    "dense_layer": {"mlp_only_layers": [0]},
    "every_second": {"decoder_sparse_step": 2},
}


@pytest.mark.parametrize("case", [*MOE_CASES, "window", "no_qkv_bias"])
def test_against_hf_qwen2_moe(case: str, tmp_path: Path):
    special = {"window": {**WINDOW, "max_window_layers": 3}, "no_qkv_bias": {"qkv_bias": False}}
    changes = {**EXPERTS, "shared_expert_intermediate_size": 40, **(MOE_CASES | special)[case]}
    hf = tiny_hf(Qwen2MoeConfig(**{**BASE, **changes}), "Qwen2MoeForCausalLM")
    checkpoint = published(hf, tmp_path)
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in checkpoint.names()
    model = ours_from(hf, checkpoint=checkpoint)
    assert_same_logits(hf, model, random_prompts(4, 128, 10, 60))


@pytest.mark.parametrize("case", [*MOE_CASES, "window"])
def test_against_hf_qwen3_moe(case: str, tmp_path: Path):
    special = {"window": {"use_sliding_window": True, "sliding_window": 8}}
    changes = {**EXPERTS, "head_dim": 32, **(MOE_CASES | special)[case]}
    hf = tiny_hf(Qwen3MoeConfig(**{**BASE, **changes}), "Qwen3MoeForCausalLM")
    model = ours_from(hf, checkpoint=published(hf, tmp_path))
    assert_same_logits(hf, model, random_prompts(4, 128, 10, 60))
