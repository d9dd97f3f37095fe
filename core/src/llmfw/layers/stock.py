"""Core's default answer to the `llmfw_layer` hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from llmfw.errors import ConfigError
from llmfw.layers.attention import Attention
from llmfw.layers.embedding import Embedding, LMHead
from llmfw.layers.linear import Linear
from llmfw.layers.mla import MLA
from llmfw.layers.mlp import MLP, GatedMLP
from llmfw.layers.moe import Experts, MoE
from llmfw.layers.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

LayerMaker = Callable[["ModelConfig[Any]", int | None, Mapping[str, Any]], nn.Module]


def _norm(config: ModelConfig[Any], layer_idx: int | None, spec: Mapping[str, Any]) -> nn.Module:
    spec = dict(spec)
    if spec.pop("norm_kind", "rms") == "layer":
        spec.pop("offset", None)
        return LayerNorm(**spec)
    spec.pop("bias", None)
    return RMSNorm(**spec)


def _mlp(config: ModelConfig[Any], layer_idx: int | None, spec: Mapping[str, Any]) -> nn.Module:
    spec = dict(spec)
    make = GatedMLP if spec.pop("gated", True) else MLP
    return make(config=config, layer_idx=layer_idx, **spec)


STOCK_LAYERS: dict[str, LayerMaker] = {
    "linear": lambda config, _, spec: Linear(mapping=config.mapping, **spec),
    "embedding": lambda config, _, spec: Embedding(mapping=config.mapping, **spec),
    "lm_head": lambda config, _, spec: LMHead(**spec),
    "norm": _norm,
    "mlp": _mlp,
    "moe": lambda config, layer_idx, spec: MoE(config=config, layer_idx=layer_idx, **spec),
    "experts": lambda config, _, spec: Experts(config=config, **spec),
    "attention": lambda config, layer_idx, spec: Attention(
        config=config, layer_idx=layer_idx, **spec
    ),
    "mla": lambda config, layer_idx, spec: MLA(config=config, layer_idx=layer_idx, **spec),
}


def stock_layer(
    kind: str, role: str, config: ModelConfig[Any], layer_idx: int | None, spec: Mapping[str, Any]
) -> nn.Module:
    """The stock layer of a kind, from its constructor's arguments.

    Raises:
        ConfigError: If core has no layer of that kind.
    """
    if kind not in STOCK_LAYERS:
        raise ConfigError(
            f"there is no stock layer of kind {kind!r}",
            hint=f"known kinds: decoder, {', '.join(STOCK_LAYERS)}; llmfw_layer can make others",
        )
    return STOCK_LAYERS[kind](config, layer_idx, spec)
