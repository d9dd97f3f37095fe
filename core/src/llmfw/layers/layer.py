"""What all layers share: they declare themselves when constructed and choose kernels when bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.errors import WeightError

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class Layer(nn.Module):
    """A module in two phases: `__init__` declares shapes and shards, `bind` chooses kernels.

    `build` calls `bind` once for every layer of the finished tree, with its name; `post_load` runs
    once after the weights are in, for tables and layouts that kernels want.
    """

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run forward."""

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Choose weights and kernels for this place in the tree.

        Args:
            name: Path of this module in the tree, e.g. "model.layers.0.mlp.down_proj".
            config: The model's configuration: dtype, device, op table, quantisation.
        """

    def post_load(self) -> None:
        """Prepare what depends on loaded weights; may run again after a part was loaded anew."""

    def load_weights(self, weights: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Fill this module's own parameters, as TensorRT-LLM's guide does by hand.

        Args:
            weights: One mapping from parameter name ("weight", "bias") to tensor for each
                checkpoint layer that this module fuses, in the order of its shards; a single one
                for a plain module.

        Raises:
            WeightError: If a parameter is missing or its shape does not fit.
        """
        for key, parameter in self._parameters.items():
            if parameter is None:
                continue
            missing = [index for index, part in enumerate(weights) if key not in part]
            if missing or not weights:
                raise WeightError(
                    f"{type(self).__name__}.{key} is missing from parts {missing} of {len(weights)}"
                )
            parts = [part[key] for part in weights]
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            if value.shape != parameter.shape:
                raise WeightError(
                    f"{type(self).__name__}.{key} has shape {list(parameter.shape)}, "
                    f"its tensors give {list(value.shape)}"
                )
            parameter.data.copy_(value)
