"""The Mamba family for llmfw: Mamba, Falcon Mamba and Mamba-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap


class Plugin:
    """The family's hooks; torch is imported only when a model is built."""

    # The defaults in small would not fit together: heads are as wide as the projection.
    tiny_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "Mamba2ForCausalLM": {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 8,
        }
    }

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
