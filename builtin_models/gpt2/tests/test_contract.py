"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract


class TestGPT2(ModelContract):
    architecture = "GPT2LMHeadModel"
    tiny_config = {
        "vocab_size": 128,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "scale_attn_by_inverse_layer_idx": True,
    }
