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
{% if cookiecutter.config == 'own' %}
    reference = staticmethod(reference)
{% endif %}
