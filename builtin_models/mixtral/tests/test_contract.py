"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract


class TestMixtral(ModelContract):
    architecture = "MixtralForCausalLM"
    tiny_config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "max_position_embeddings": 128,
        "sliding_window": 12,
    }
