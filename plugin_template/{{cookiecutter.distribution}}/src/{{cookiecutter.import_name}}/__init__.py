"""{{ cookiecutter.model_name }} for llmfw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw import DecoderModelForCausalLM, ModelConfig, WeightMap
{% if cookiecutter.config == 'own' %}

    from {{ cookiecutter.import_name }}.configuration import {{ cookiecutter.__config_class }}
{% endif %}


class Plugin:
    """The model's hooks; torch is imported only when a model is built."""
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
