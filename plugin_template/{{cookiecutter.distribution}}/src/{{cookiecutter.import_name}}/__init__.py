"""{{ cookiecutter.model_name }} for llmfw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap
{% if cookiecutter.config == 'own' %}

    from {{ cookiecutter.import_name }}.configuration import {{ cookiecutter.__config_class }}
{% endif %}

# A configuration that runs in milliseconds: `llmfw check` and the tests build it.
TINY: dict[str, Any] = {% if cookiecutter.__tiny_config %}{{ cookiecutter.__tiny_config }}
{% else %}{
    "model_type": "{{ cookiecutter.model_type }}",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
{% endif %}


class Plugin:
    """The model's hooks; torch is imported only when a model is built."""

    tiny_configs: ClassVar[dict[str, dict[str, Any]]] = {"{{ cookiecutter.architecture }}": TINY}
{% if cookiecutter.config == 'own' %}

    @hookimpl
    def llmfw_config(self, raw: dict[str, Any]) -> {{ cookiecutter.__config_class }}:
        """The configuration, from its config.json."""
        from {{ cookiecutter.import_name }}.configuration import {{ cookiecutter.__config_class }}

        return {{ cookiecutter.__config_class }}.from_dict(raw)
{% endif %}

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any]:
        """The decoder, described by its configuration."""
        from {{ cookiecutter.import_name }}.modeling import {{ cookiecutter.architecture }}

        return {{ cookiecutter.architecture }}(model_config)

    @hookimpl
{% if 'config.' in cookiecutter.__weights %}
    def llmfw_weight_map(self, model_config: ModelConfig[Any]) -> WeightMap:
        """The checkpoint's names."""
        from {{ cookiecutter.import_name }}.weights import weight_map

        return weight_map(model_config.pretrained_config)
{% else %}
    def llmfw_weight_map(self) -> WeightMap:
        """The checkpoint's names."""
        from {{ cookiecutter.import_name }}.weights import WEIGHTS

        return WEIGHTS
{% endif %}


plugin = Plugin()
