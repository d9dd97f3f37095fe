"""Which model of transformers an architecture is, and why one cannot be served."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmfw.errors import ConfigError, UnknownArchitectureError
from llmfw.plugins import Catalog, unknown_architecture

NAME = "llmfw-transformers"


def refused(architecture: str, reason: str, cure: str = "") -> UnknownArchitectureError:
    """The error for an architecture that the fallback cannot serve; nothing has been loaded yet.

    Args:
        architecture: As in config.json.
        reason: Why, as the end of a sentence that begins with the fallback's name.
        cure: What else helps.
    """
    label = f"the fallback {NAME} does not serve it on transformers {transformers.__version__}"
    error = unknown_architecture(Catalog.scan(), architecture, refusal=f"{label}: {reason}")
    if cure:
        error.hint = f"{cure}\n{error.hint}"
    return error


def configuration_of(raw: Mapping[str, Any]) -> Any:
    """transformers' configuration object of a raw config.json.

    Raises:
        UnknownArchitectureError: If transformers has no causal model of that name.
        ConfigError: If transformers refuses the values, or the weights are quantised.
    """
    architecture = str(raw["architectures"][0])
    causal_model_class(architecture, has_own_code="auto_map" in raw)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise refused(architecture, f"it knows no configuration for model_type {model_type!r}")
    if raw.get("quantization_config"):
        raise ConfigError(
            f"the fallback {NAME} does not load quantised checkpoints",
            hint="take the checkpoint that it was made from",
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except Exception as exc:
        raise ConfigError(f"config.json is not a valid {model_type} configuration: {exc}") from exc
    config.architectures = [architecture]
    return config


def causal_model_class(architecture: str, *, has_own_code: bool = False) -> Any:
    """The class in transformers.

    Raises:
        UnknownArchitectureError: If there is none, or it is no causal model.
    """
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update((value,) if isinstance(value, str) else value)
    if architecture in names:
        return getattr(transformers, architecture)
    if has_own_code:
        reason = "the checkpoint brings Python code of its own (auto_map), which is never run"
    elif hasattr(transformers, architecture):
        reason = "it is no causal language model"
    else:
        reason = "transformers has no model of that name"
    raise refused(architecture, reason)


def declared_model(config: Any, attention: str = "eager") -> Any:
    """transformers' model of a configuration, on the device that is current, nothing computed.

    Args:
        config: transformers' configuration; it is left as it is.
        attention: Name of the attention function that it calls.
    """
    own = copy.deepcopy(config)
    own._attn_implementation = attention
    with initialization.no_init_weights():
        return causal_model_class(config.architectures[0])(own).eval()
