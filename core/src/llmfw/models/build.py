"""Building a model from its configuration: the only caller of the model hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfw.config import ModelConfig, pretrained_config_from
from llmfw.errors import ConfigError, PluginContractError
from llmfw.layers import Layer, LMHead, stock_layer
from llmfw.models.causal_lm import StockDecoderForCausalLM
from llmfw.models.decoder import StockDecoderLayer
from llmfw.models.pretrained import PretrainedModel
from llmfw.plugins import PluginHost, hookimpl, resolve_plugin
from llmfw.weights import WeightMap


class CoreDefaults:
    """Core's own answers to the hooks; a plugin's come first."""

    @hookimpl(trylast=True)
    def llmfw_config(self, raw: Mapping[str, Any], model_dir: Path) -> Any:
        """The class that transformers knows for model_type."""
        return pretrained_config_from(dict(raw))

    @hookimpl(trylast=True)
    def llmfw_model(self, model_config: ModelConfig[Any]) -> PretrainedModel[Any]:
        """The stock decoder that the configuration describes."""
        return StockDecoderForCausalLM(model_config)

    @hookimpl(trylast=True)
    def llmfw_layer(
        self,
        kind: str,
        role: str,
        model_config: ModelConfig[Any],
        layer_idx: int | None,
        spec: Mapping[str, Any],
    ) -> nn.Module:
        """The stock layer of that kind."""
        if kind == "decoder":
            return StockDecoderLayer(model_config, layer_idx or 0, **spec)
        return stock_layer(kind, role, model_config, layer_idx, spec)

    @hookimpl(trylast=True)
    def llmfw_weight_map(self, model_config: ModelConfig[Any], checkpoint: Any) -> WeightMap:
        """Names as in the module tree, fused modules from their declared shards."""
        return WeightMap()


def build(model_config: ModelConfig[Any], host: PluginHost | None = None) -> PretrainedModel[Any]:
    """Construct the model on the meta device and bind every layer to its kernels.

    A plugin may call it for a part that another plugin owns: without a host, the plugin is found
        by the
    configuration's own architecture.

    Args:
        model_config: What to build from; its `layer_factory` is set here.
        host: The plugin's hooks.

    Returns:
        The model, its parameters on the meta device, ready to be loaded.

    Raises:
        PluginContractError: If the plugin returned something that is not a model.
    """
    if host is None:
        host = host_for(architecture_in(model_config.pretrained_config))
    hooks = host.hook

    def make_layer(
        kind: str,
        role: str,
        config: ModelConfig[Any],
        layer_idx: int | None,
        spec: Mapping[str, Any],
    ) -> nn.Module:
        layer = hooks.llmfw_layer(
            kind=kind, role=role, model_config=config, layer_idx=layer_idx, spec=spec
        )
        if not isinstance(layer, nn.Module):
            raise PluginContractError(
                f"llmfw_layer of {host.name} returned {type(layer).__name__} for {kind} {role!r}, "
                "not a torch module"
            )
        return layer

    model_config = replace(model_config, layer_factory=make_layer)
    with _declaring(model_config.dtype):
        model = hooks.llmfw_model(model_config=model_config)
    if not isinstance(model, PretrainedModel):
        raise PluginContractError(
            f"llmfw_model of {host.name} returned {type(model).__name__}",
            hint="it has to return a DecoderModelForCausalLM or another PretrainedModel",
        )
    bind_tree(model, model_config)
    return model


def bind_tree(model: nn.Module, model_config: ModelConfig[Any]) -> None:
    """Give every layer of a finished tree its name, its weights' form and its kernels."""
    with _declaring(model_config.dtype):
        for name, module in model.named_modules():
            if isinstance(module, Layer):
                module.bind(name, model_config)
        tie_heads(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    model.eval()


def tie_heads(model: nn.Module) -> None:
    """Make each tied head hold its embedding's parameter again."""
    for module in model.modules():
        if isinstance(module, LMHead) and module.tied_to is not None:
            module.weight = module.tied_to.weight


def finish_loading(model: nn.Module) -> None:
    """Run every layer's `post_load`, children first, once all parameters are filled.

    Raises:
        ConfigError: If a buffer was computed while the model was only declared.
    """
    tie_heads(model)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ConfigError(
                f"buffer {name} has no values: it was computed while the model was being declared",
                hint="compute tables in the layer's post_load()",
            )
    for module in reversed(list(model.modules())):
        if isinstance(module, Layer):
            module.post_load()


def host_for(architecture: str) -> PluginHost:
    """The hooks of the plugin that serves an architecture.

    Raises:
        PluginError: If none does, several do, or it cannot be loaded.
    """
    resolved = resolve_plugin(architecture)
    return PluginHost(resolved.plugin, name=resolved.label, defaults=CoreDefaults())


def architecture_in(config: Any) -> str:
    """The architecture that a configuration object names.

    Raises:
        ConfigError: If it names none.
    """
    names = getattr(config, "architectures", None)
    if not names:
        raise ConfigError(
            f"{type(config).__name__} names no architecture",
            hint="set config.architectures = ['...']",
        )
    return str(names[0])


@contextmanager
def _declaring(dtype: torch.dtype) -> Iterator[None]:
    """New tensors go to the meta device and have the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
