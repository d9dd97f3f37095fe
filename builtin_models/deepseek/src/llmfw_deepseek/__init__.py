"""The DeepSeek family for llmfw: V2, V2-Lite, V2.5, V3, V3.1 and R1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The family's hooks; torch is imported only when a model is built."""

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
