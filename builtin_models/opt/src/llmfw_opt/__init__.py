"""OPT for llmfw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The model's hooks; torch is imported only when a model is built."""

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any]:
        """The decoder, from layers of its own."""
        from llmfw_opt.modeling import OPTForCausalLM

        return OPTForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_opt.weights import WEIGHTS

        return WEIGHTS


plugin = Plugin()
