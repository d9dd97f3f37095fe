"""The fallback of llmfw: causal models of transformers that no plugin owns, on llmfw's engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import ModelConfig, WeightMap
    from llmfw.models import PretrainedModel
    from llmfw.weights import Checkpoint


class Plugin:
    """The hooks of the fallback; torch and transformers are imported only when it serves.

    `tiny_configs` names the architectures that `llmfw check` and pytest try it on: transformers'
    defaults in small, where nothing else is said.
    """

    tiny_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "Olmo2ForCausalLM": {},
        "Cohere2ForCausalLM": {},
        "GraniteMoeForCausalLM": {},
    }

    @hookimpl
    def llmfw_config(self, raw: Mapping[str, Any]) -> Any:
        """transformers' own configuration object, if its model of it can be served."""
        from llmfw_transformers.architectures import configuration_of

        return configuration_of(raw)

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> PretrainedModel[Any]:
        """transformers' module tree with our attention, linear layers and norms."""
        from llmfw_transformers.modeling import TransformersForCausalLM

        return TransformersForCausalLM(model_config)

    @hookimpl
    def llmfw_weight_map(self, model_config: ModelConfig[Any], checkpoint: Checkpoint) -> WeightMap:
        """transformers' conversion of checkpoints, as rules."""
        from llmfw_transformers.weights import weight_map

        return weight_map(model_config, checkpoint)


plugin = Plugin()
