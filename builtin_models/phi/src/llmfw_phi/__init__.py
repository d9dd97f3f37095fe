"""The Phi family for llmfw: Phi-1, Phi-1.5, Phi-2, and Phi-3 to Phi-4, dense."""

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
        from llmfw_phi.modeling import PhiForCausalLM

        return PhiForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_phi.weights import WEIGHTS

        return WEIGHTS


plugin = Plugin()
