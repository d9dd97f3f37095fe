"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract


class TestGptOss(ModelContract):
    architecture = "GptOssForCausalLM"
    tiny_config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "max_position_embeddings": 128,
    }
