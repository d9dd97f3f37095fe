"""What a model is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from llmfw.config.mapping import Mapping
from llmfw.config.quant_config import QuantConfig
from llmfw.config.reading import text_config
from llmfw.errors import ConfigError
from llmfw.ops.kernel import DeviceInfo
from llmfw.ops.table import OpTable

TConfig = TypeVar("TConfig")
MakeLayer = Callable[..., nn.Module]


def _cpu_reference_ops() -> OpTable:
    return OpTable(DeviceInfo(torch.device("cpu"), frozenset({"cpu"})))


@dataclass
class ModelConfig(Generic[TConfig]):
    """Everything a model's constructor may ask for.

    Args:
        pretrained_config: The checkpoint's configuration, a transformers config object or one of
            the plugin's own.
        mapping: Parallel ranks.
        quant_config: How weights are quantised.
        dtype: Type of parameters and activations.
        device: Where the parameters will live.
        ops: The op table that layers resolve their callables from.
        attn_backend: "auto", "vanilla" (torch only) or the name of another attention backend.
        max_model_len: Longest sequence the engine will run, in tokens; fixes dynamic and longrope
            factors.
        block_size: Tokens in one block of the KV cache.
        tables: Tensors that equal layers share, such as the cosines and sines of one rotary
            embedding.
        layer_factory: How `make` builds a layer; `llmfw.models.build` puts the plugin's hooks here.
    """

    pretrained_config: TConfig
    mapping: Mapping = field(default_factory=Mapping)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ops: OpTable = field(default_factory=_cpu_reference_ops)
    attn_backend: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    tables: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)
    layer_factory: MakeLayer | None = field(default=None, repr=False)

    def make(self, kind: str, role: str, *, layer_idx: int | None = None, **spec: Any) -> nn.Module:
        """Build one layer through the `llmfw_layer` hook.

        Args:
            kind: "decoder", "attention", "mlp", "moe", "experts", "norm", "linear", "embedding" or
                "lm_head".
            role: What the layer is for, e.g. "q_proj", "input_layernorm"; often its attribute name.
            layer_idx: Index of the decoder layer it belongs to.
            **spec: The stock layer's constructor arguments.

        Raises:
            ConfigError: Outside of `build`, when no layer_factory was given.
        """
        if self.layer_factory is None:
            raise ConfigError(
                "this ModelConfig has no layer factory",
                hint="use llmfw.models.build, or give layer_factory=llmfw.layers.stock_layer",
            )
        return self.layer_factory(kind, role, self, layer_idx, spec)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the checkpoint's configuration allows, if it says so."""
        value = getattr(text_config(self.pretrained_config), "max_position_embeddings", None)
        return int(value) if value else None
