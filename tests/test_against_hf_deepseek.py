"""DeepSeek V2 and V3 against transformers, on tiny random configurations with all switches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config

from llmfw import ConfigError, ModelConfig, build
from parity import assert_same_logits, ours_from, published, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "eos_token_id": None,
    "bos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 20},
    "biases": {"q_lora_rank": 20, "attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "mscales_differ": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "no_mscale_all_dim": {"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "all_dense": {"first_k_dense_replace": 3},
    "no_dense": {"first_k_dense_replace": 0},
    "scaled": {"routed_scaling_factor": 2.5},
    "tied": {"tie_word_embeddings": True},
    "one_head_of_one_expert": {"num_attention_heads": 1, "num_experts_per_tok": 1},
}
V2_CASES: dict[str, dict[str, Any]] = {
    **CASES,
    "mlp_bias": {"mlp_bias": True},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "groups_not_used": {"topk_method": "greedy", "n_group": 4, "topk_group": 2},
}
V3_CASES: dict[str, dict[str, Any]] = {
    **CASES,
    "one_group": {"n_group": 1, "topk_group": 1},
    "not_normalised": {"norm_topk_prob": False},
    "half_rope": {"rope_interleave": False},
}


@pytest.mark.parametrize("case", V2_CASES)
def test_against_hf_deepseek_v2(case: str, tmp_path: Path):
    config = DeepseekV2Config(**{**BASE, **V2_CASES[case]})
    hf = tiny_hf(config, "DeepseekV2ForCausalLM")
    model = ours_from(hf, checkpoint=published(hf, tmp_path))
    assert_same_logits(hf, model, random_prompts(4, 128, 10, 60))


@pytest.mark.parametrize("case", V3_CASES)
def test_against_hf_deepseek_v3(case: str, tmp_path: Path):
    config = DeepseekV3Config(**{**BASE, "n_group": 4, "topk_group": 2, **V3_CASES[case]})
    hf = tiny_hf(config, "DeepseekV3ForCausalLM")
    generator = torch.Generator().manual_seed(1)
    for name, buffer in hf.named_buffers():  # zero in a new model, learned in published ones
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    checkpoint = published(hf, tmp_path)
    if case != "all_dense":
        assert "model.layers.2.mlp.experts.7.gate_proj.weight" in checkpoint.names()
        assert "model.layers.2.mlp.gate.e_score_correction_bias" in checkpoint.names()
    model = ours_from(hf, checkpoint=checkpoint)
    assert_same_logits(hf, model, random_prompts(4, 128, 10, 60))


def test_a_layer_frequency_that_transformers_does_not_know():
    """Published models have 1; their own code reads it."""
    from llmfw_deepseek.modeling import has_experts

    config = DeepseekV2Config(**BASE, moe_layer_freq=2)
    assert [has_experts(config, i) for i in range(5)] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ],
)
def test_routing_that_no_published_model_has_is_refused(
    architecture: str, changes: dict[str, Any], told: str
):
    kind = DeepseekV2Config if "V2" in architecture else DeepseekV3Config
    config = kind(**{**BASE, **changes}, architectures=[architecture])
    with pytest.raises(ConfigError, match=f"{told} is not supported"):
        build(ModelConfig(pretrained_config=config))
