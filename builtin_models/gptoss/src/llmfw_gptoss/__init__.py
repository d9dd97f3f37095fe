"""gpt-oss for llmfw: gpt-oss-20b and gpt-oss-120b."""

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
        from llmfw_gptoss.modeling import GptOssForCausalLM

        return GptOssForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self, model_config: ModelConfig[Any]) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_gptoss.weights import weight_map

        return weight_map(model_config.pretrained_config)


plugin = Plugin()
