"""GPT-2 against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config

from llmfw.weights import MemoryCheckpoint
from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "n_inner": {"n_inner": 96},
    "gelu": {"activation_function": "gelu"},
    "unscaled": {"scale_attn_weights": False},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "eps": {"layer_norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_gpt2(case: str):
    hf = tiny_hf(GPT2Config(**{**BASE, **CASES[case]}), "GPT2LMHeadModel")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


def test_against_hf_gpt2_as_first_published():
    """The original file has no prefix, no head, and the causal mask in every layer."""
    hf = tiny_hf(GPT2Config(**BASE), "GPT2LMHeadModel")
    tensors = {
        name.removeprefix("transformer."): value.clone()
        for name, value in hf.state_dict().items()
        if name != "lm_head.weight"
    }
    mask = torch.ones(1, 1, 128, 128).tril()
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    model = ours_from(hf, checkpoint=MemoryCheckpoint(tensors))
    assert_same_logits(hf, model, random_prompts(2, 128, 8, 60))
