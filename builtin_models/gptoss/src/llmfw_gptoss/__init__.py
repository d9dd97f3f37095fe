"""gpt-oss for llmfw: gpt-oss-20b and gpt-oss-120b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import Attention, DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The family's hooks; torch is imported only when a model is built."""

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any]:
        """The decoder, described by its configuration."""
        from llmfw_gptoss.modeling import GptOssForCausalLM

        return GptOssForCausalLM(model_config)

    @hookimpl
    def llmfw_layer(
        self, kind: str, model_config: ModelConfig[Any], layer_idx: int, spec: Mapping[str, Any]
    ) -> Attention | None:
        """Attention has sinks; all else is stock."""
        if kind != "attention":
            return None
        from llmfw import Attention

        return Attention(config=model_config, layer_idx=layer_idx, sinks=True, **spec)

    @hookimpl
    def llmfw_weight_map(self, model_config: ModelConfig[Any]) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_gptoss.weights import weight_map

        return weight_map(model_config.pretrained_config)


plugin = Plugin()
