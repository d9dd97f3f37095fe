"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class TestQwen2(ModelContract):
    architecture = "Qwen2ForCausalLM"
    tiny_config = {
        **TINY,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    }


class TestQwen3(ModelContract):
    architecture = "Qwen3ForCausalLM"
    tiny_config = {**TINY, "head_dim": 32}


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


class TestQwen2Moe(ModelContract):
    architecture = "Qwen2MoeForCausalLM"
    tiny_config = {**TINY, **EXPERTS, "shared_expert_intermediate_size": 40}


class TestQwen3Moe(ModelContract):
    architecture = "Qwen3MoeForCausalLM"
    tiny_config = {
        **TINY,
        **EXPERTS,
        "head_dim": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    }
