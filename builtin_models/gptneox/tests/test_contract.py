"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


class TestGPTNeoX(ModelContract):
    architecture = "GPTNeoXForCausalLM"
    tiny_config = TINY


class TestSequential(ModelContract):
    architecture = "GPTNeoXForCausalLM"
    tiny_config = {**TINY, "use_parallel_residual": False}
