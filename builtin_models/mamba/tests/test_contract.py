"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract

TINY = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
HEADS = {"num_heads": 8, "head_dim": 16, "n_groups": 2}


class TestMamba(ModelContract):
    architecture = "MambaForCausalLM"
    tiny_config = TINY


class TestFalconMamba(ModelContract):
    architecture = "FalconMambaForCausalLM"
    tiny_config = TINY


class TestMamba2(ModelContract):
    architecture = "Mamba2ForCausalLM"
    tiny_config = {**TINY, **HEADS}
