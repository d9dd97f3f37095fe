"""GPT-NeoX against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig

from llmfw.weights import MemoryCheckpoint
from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "all_rotated": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    "half_rotated": {"rotary_pct": 0.5, "rotary_emb_base": 1000},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "no_attention_bias": {"attention_bias": False},
    "gelu_fast": {"hidden_act": "gelu_fast"},
    "tied": {"tie_word_embeddings": True},
    "eps": {"layer_norm_eps": 1e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_gptneox(case: str):
    hf = tiny_hf(GPTNeoXConfig(**{**BASE, **CASES[case]}), "GPTNeoXForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


def test_against_hf_gptneox_as_first_published():
    """Older files call the head embed_out and hold masks and rotary frequencies."""
    hf = tiny_hf(GPTNeoXConfig(**BASE), "GPTNeoXForCausalLM")
    tensors = {name: value.clone() for name, value in hf.state_dict().items()}
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention."
        tensors[attention + "bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
        tensors[attention + "masked_bias"] = torch.tensor(-1e9)
        tensors[attention + "rotary_emb.inv_freq"] = torch.ones(2)
    model = ours_from(hf, checkpoint=MemoryCheckpoint(tensors))
    assert_same_logits(hf, model, random_prompts(2, 128, 8, 60))
