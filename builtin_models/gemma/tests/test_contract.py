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
    "head_dim": 32,
    "max_position_embeddings": 128,
}


class TestGemma(ModelContract):
    architecture = "GemmaForCausalLM"
    tiny_config = TINY


class TestGemma2(ModelContract):
    architecture = "Gemma2ForCausalLM"
    tiny_config = {**TINY, "sliding_window": 12, "query_pre_attn_scalar": 32}


class TestGemma3(ModelContract):
    architecture = "Gemma3ForCausalLM"
    tiny_config = {**TINY, "sliding_window": 12, "sliding_window_pattern": 2}
