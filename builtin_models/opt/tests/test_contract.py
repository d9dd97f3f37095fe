"""The contract that every plugin passes."""

from __future__ import annotations

from typing import Any

from llmfw.testing import ModelContract

TINY: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}


class TestContract(ModelContract):
    architecture = "OPTForCausalLM"
    tiny_config = TINY


class TestNormsAfterAndProjections(ModelContract):
    architecture = "OPTForCausalLM"
    tiny_config = {**TINY, "do_layer_norm_before": False, "word_embed_proj_dim": 32}
