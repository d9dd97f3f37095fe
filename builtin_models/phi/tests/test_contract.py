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
    "pad_token_id": None,
}


class TestPhi(ModelContract):
    architecture = "PhiForCausalLM"
    tiny_config = {**TINY, "qk_layernorm": True}


class TestPhi3(ModelContract):
    architecture = "Phi3ForCausalLM"
    tiny_config = {**TINY, "num_key_value_heads": 2, "sliding_window": 12}
