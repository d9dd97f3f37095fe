"""What every plugin has to pass, on a tiny random model."""

from __future__ import annotations

{% if cookiecutter.config == 'own' %}
from typing import Any

{% endif %}
from llmfw.testing import ModelContract
{% if cookiecutter.config == 'own' %}
from transformers import LlamaConfig, LlamaForCausalLM
{% endif %}

{% if cookiecutter.config == 'own' %}

def reference(config: Any) -> LlamaForCausalLM:
    """What the model has to agree with; put the model's own code in its place."""
    return LlamaForCausalLM(LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"}))

{% endif %}

class TestContract(ModelContract):
    """The checks of `llmfw.testing` for this plugin's architecture."""

    architecture = "{{ cookiecutter.architecture }}"
    distribution = "{{ cookiecutter.distribution }}"
{% if cookiecutter.__tiny_config %}
    tiny_config = {{ cookiecutter.__tiny_config }}
{% else %}
    tiny_config = {
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
{% if cookiecutter.config == 'own' %}
    reference = staticmethod(reference)
{% endif %}
