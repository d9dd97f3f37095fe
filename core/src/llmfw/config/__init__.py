"""Configuration: what a model is built from, and how it is read."""

from llmfw.config.mapping import Mapping
from llmfw.config.model_config import ModelConfig, TConfig
from llmfw.config.pretrained import PretrainedConfig, pretrained_config_from
from llmfw.config.quant_config import QuantConfig
from llmfw.config.reading import architecture_of, read_config_json, text_config

__all__ = [
    "Mapping",
    "ModelConfig",
    "PretrainedConfig",
    "QuantConfig",
    "TConfig",
    "architecture_of",
    "pretrained_config_from",
    "read_config_json",
    "text_config",
]
