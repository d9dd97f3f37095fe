"""The Mamba family for llmfw: Mamba, Falcon Mamba and Mamba-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The family's hooks; torch is imported only when a model is built."""

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any]:
        """The decoder, from layers of its own."""
        from llmfw_mamba.modeling import MambaForCausalLM

        return MambaForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_mamba.weights import WEIGHTS

        return WEIGHTS


plugin = Plugin()
