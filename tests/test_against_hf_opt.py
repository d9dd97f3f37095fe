"""OPT against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import OPTConfig

from parity import assert_greedy, assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
    "eos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "post_norm": {"do_layer_norm_before": False},
    "projections": {"word_embed_proj_dim": 32},
    "as_the_350M": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "no_biases": {"enable_bias": False},
    "norms_without_weights": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", CASES)
def test_against_hf_opt(case: str):
    hf = tiny_hf(OPTConfig(**{**BASE, **CASES[case]}), "OPTForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 10, 60))


def test_the_last_position_is_within_the_table():
    hf = tiny_hf(OPTConfig(**BASE), "OPTForCausalLM")
    assert_same_logits(hf, ours_from(hf), random_prompts(1, 128, 64, 64))


def test_it_runs_with_the_default_settings(tmp_path):
    """The longest prompt and the engine's own batch sizes stay within the position table."""
    from llmfw import LLM, SamplingParams

    hf = tiny_hf(OPTConfig(**BASE), "OPTForCausalLM")
    hf.save_pretrained(tmp_path)
    prompt = random_prompts(1, 128, 48, 48)[0]
    with LLM(tmp_path, skip_tokenizer_init=True) as llm:
        assert llm.max_model_len == 64
        answer = llm.generate(prompt, SamplingParams(max_tokens=16, temperature=0))
    assert_greedy(hf, prompt, list(answer.outputs[0].token_ids), tie=1e-4)


def test_the_names_of_the_bare_decoder_load(tmp_path):
    hf = tiny_hf(OPTConfig(**BASE), "OPTForCausalLM")
    names = {f"model.{name}": name for name in hf.model.state_dict()}
    assert all(name.startswith("decoder.") for name in names.values())
    state = {names[name]: value for name, value in hf.state_dict().items() if name in names}
    hf.state_dict = lambda: state  # type: ignore[method-assign]
    assert_same_logits(hf, ours_from(hf), random_prompts(2, 128, 10, 40))
