"""Mixtral against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig

from parity import assert_same_logits, ours_from, published, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_expert": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 6},
    "window": {"sliding_window": 9},
    "gelu_and_head_dim": {"hidden_act": "gelu", "head_dim": 32},
    "relu": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_mixtral(case: str, tmp_path: Path):
    hf = tiny_hf(MixtralConfig(**{**BASE, **CASES[case]}), "MixtralForCausalLM")
    checkpoint = published(hf, tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.5.w2.weight" in checkpoint.names()
    model = ours_from(hf, checkpoint=checkpoint)
    assert_same_logits(hf, model, random_prompts(4, 128, 8, 60))


def test_against_hf_mixtral_with_experts_in_one_tensor():
    """As transformers has them in memory."""
    hf = tiny_hf(MixtralConfig(**BASE), "MixtralForCausalLM")
    assert hf.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 96, 64)
    assert_same_logits(hf, ours_from(hf), random_prompts(2, 128, 8, 60))
