"""The family held to the model contract."""

from __future__ import annotations

from llmfw.testing import ModelContract
from llmfw_deepseek import plugin

TINY = plugin.tiny_configs["DeepseekV2ForCausalLM"]


class TestDeepseekV2(ModelContract):
    architecture = "DeepseekV2ForCausalLM"
    tiny_config = TINY


class TestDeepseekV3(ModelContract):
    architecture = "DeepseekV3ForCausalLM"
    tiny_config = {
        **TINY,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
