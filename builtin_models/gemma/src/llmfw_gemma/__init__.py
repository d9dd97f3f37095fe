"""The Gemma family for llmfw: Gemma, Gemma 2 and the text part of Gemma 3."""

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
        from llmfw_gemma.modeling import GemmaForCausalLM

        return GemmaForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_gemma.weights import WEIGHTS

        return WEIGHTS


plugin = Plugin()
