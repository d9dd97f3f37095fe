"""The DeepSeek family for llmfw: V2, V2-Lite, V2.5, V3, V3.1 and R1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The family's hooks; torch is imported only when a model is built."""

    # transformers' defaults do not say how many experts a token goes through.
    tiny_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "DeepseekV2ForCausalLM": {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "kv_lora_rank": 24,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        }
    }

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any]:
        """The decoder, described by its configuration."""
        from llmfw_deepseek.modeling import DeepseekForCausalLM

        return DeepseekForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self, model_config: ModelConfig[Any]) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_deepseek.weights import weight_map

        return weight_map(model_config.pretrained_config)


plugin = Plugin()
