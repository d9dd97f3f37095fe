"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class TestLlama(ModelContract):
    architecture = "LlamaForCausalLM"
    tiny_config = {**TINY, "attention_bias": True, "mlp_bias": True}


class TestMistral(ModelContract):
    architecture = "MistralForCausalLM"
    tiny_config = {**TINY, "head_dim": 32, "sliding_window": 12, "tie_word_embeddings": True}
