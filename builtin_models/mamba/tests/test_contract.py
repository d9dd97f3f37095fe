"""The family held to the model contract."""

from __future__ import annotations

import transformers
from packaging.version import Version

from llmfw.testing import ModelContract

# Before 5.23 transformers normalises over all groups at once, unlike mamba_ssm.
GROUPS = 2 if Version(transformers.__version__) >= Version("5.23") else 1
TINY = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
HEADS = {"num_heads": 8, "head_dim": 16, "n_groups": GROUPS}


class TestMamba(ModelContract):
    architecture = "MambaForCausalLM"
    tiny_config = TINY


class TestFalconMamba(ModelContract):
    architecture = "FalconMambaForCausalLM"
    tiny_config = TINY


class TestMamba2(ModelContract):
    architecture = "Mamba2ForCausalLM"
    tiny_config = {**TINY, **HEADS}
