"""The LLaMA family for llmfw: LLaMA 2 and 3, Mistral, SmolLM2 and what follows their layout."""

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
        from llmfw_llama.modeling import LlamaForCausalLM

        return LlamaForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from llmfw_llama.weights import WEIGHTS

        return WEIGHTS


plugin = Plugin()
