{% if cookiecutter.base == 'decoder' %}
"""{{ cookiecutter.model_name }}: the stock decoder, as its configuration describes it."""

from __future__ import annotations

{% if cookiecutter.config == 'own' %}
from llmfw import {{ cookiecutter.__imports or 'DecoderSpec, ModelConfig, StockDecoderForCausalLM' }}

from {{ cookiecutter.import_name }}.configuration import {{ cookiecutter.__config_class }}
{% else %}
from typing import Any

from llmfw import {{ cookiecutter.__imports or 'DecoderSpec, ModelConfig, StockDecoderForCausalLM' }}
{% endif %}


class {{ cookiecutter.architecture }}(StockDecoderForCausalLM):
    """The stock decoder with this model's switches.

    Args:
        model_config: The model's configuration.
    """

{% if cookiecutter.config == 'own' %}
    def __init__(self, model_config: ModelConfig[{{ cookiecutter.__config_class }}]) -> None:
{% else %}
    def __init__(self, model_config: ModelConfig[Any]) -> None:
{% endif %}
        config = model_config.pretrained_config
        spec = {{ cookiecutter.__spec or 'DecoderSpec.from_config(config)' }}
        super().__init__(model_config, spec)
{% else %}
{% set config_class = cookiecutter.__config_class if cookiecutter.config == 'own' else 'Any' %}
"""{{ cookiecutter.model_name }}, from layers of its own."""

from __future__ import annotations

from typing import Any

import torch
from llmfw import (
    Attention,
    AttentionMetadata,
    DecoderLayer,
    DecoderModel,
    DecoderModelForCausalLM,
    Embedding,
    GatedMLP,
    ModelConfig,
    RMSNorm,
    RopeParams,
)
from torch import nn
{% if cookiecutter.config == 'own' %}

from {{ cookiecutter.import_name }}.configuration import {{ cookiecutter.__config_class }}
{% endif %}


class Layer(DecoderLayer):
    """Attention and MLP, each after a norm and added to the stream.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0; it names the layer's cache.
    """

    def __init__(self, model_config: ModelConfig[{{ config_class }}], layer_idx: int) -> None:
        super().__init__()
        config = model_config.pretrained_config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None),
            bias=config.attention_bias,
            rope=RopeParams.from_config(config),
            layer_idx=layer_idx,
            config=model_config,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            bias=config.mlp_bias,
            activation=config.hidden_act,
            config=model_config,
        )

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer over packed tokens: [tokens, hidden_size] -> (hidden states, residual)."""
        if residual is None:
            hidden, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden, residual = self.input_layernorm(hidden_states, residual)
        hidden = self.self_attn(position_ids, hidden, attn_metadata, **kwargs)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Model(DecoderModel[{{ config_class }}]):
    """Embedding, layers and final norm; the inherited forward runs them.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[{{ config_class }}]) -> None:
        super().__init__(model_config)
        config = model_config.pretrained_config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(model_config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class {{ cookiecutter.architecture }}(DecoderModelForCausalLM[Model, {{ config_class }}]):
    """The decoder and its head.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[{{ config_class }}]) -> None:
        config = model_config.pretrained_config
        super().__init__(
            Model(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
{% endif %}
