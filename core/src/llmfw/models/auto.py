"""`register_auto_model`: a model class in a script or a single file becomes a plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from llmfw.config import ModelConfig
from llmfw.models.pretrained import PretrainedModel
from llmfw.plugins import hookimpl
from llmfw.plugins.local import register_local

TClass = TypeVar("TClass", bound=type[PretrainedModel[Any]])


class ClassPlugin:
    """The hooks of a model class: its constructor, its configuration class and its weight map.

    Args:
        model_class: Called with the model's configuration. A class attribute or static method
            `weight_map` (a `WeightMap`, or a function of model_config and checkpoint) answers
            `llmfw_weight_map`.
    """

    def __init__(self, model_class: type[PretrainedModel[Any]]) -> None:
        self.model_class = model_class

    @hookimpl
    def llmfw_config(self, raw: dict[str, Any], model_dir: Path) -> Any:
        """The configuration class that the model was declared with."""
        config_class = config_class_of(self.model_class)
        if config_class is None:
            return None
        return config_class.from_dict(raw)

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> PretrainedModel[Any]:
        """The model itself."""
        return self.model_class(model_config)

    @hookimpl
    def llmfw_weight_map(self, model_config: ModelConfig[Any], checkpoint: Any) -> Any:
        """The class's own map, if it has one."""
        own = getattr(self.model_class, "weight_map", None)
        return own(model_config, checkpoint) if callable(own) else own


def config_class_of(model_class: type) -> Any | None:
    """TConfig of `DecoderModelForCausalLM[TModel, TConfig]`, when it can read a dictionary."""
    for base in getattr(model_class, "__orig_bases__", ()):
        for argument in get_args(base):
            if isinstance(argument, type) and hasattr(argument, "from_dict"):
                return argument
    return None


def register_auto_model(architecture: str) -> Callable[[TClass], TClass]:
    """Serve `architecture` with the decorated class, for this process.

    It wins over an installed plugin, with one logged line. Classes in `__main__` or a single file
    are found this way; a package names its plugin in an entry point instead.

    Args:
        architecture: The string in config.json's `architectures`.
    """

    def register(model_class: TClass) -> TClass:
        module = sys.modules.get(model_class.__module__)
        origin = getattr(module, "__file__", None) or model_class.__module__
        register_local(architecture, ClassPlugin(model_class), origin)
        return model_class

    return register
