"""Filling a built model: through its weight map, or its author's own `load_weights`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmfw.errors import WeightError
from llmfw.models.build import finish_loading, tie_heads
from llmfw.models.pretrained import PretrainedModel
from llmfw.weights import Checkpoint, WeightMap, load_into

logger = logging.getLogger("llmfw.weights")


class ReadTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, remembering which were read.

    Args:
        tensors: Where they come from.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._unread = dict.fromkeys(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._tensors[name]
        self._unread.pop(name, None)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of the tensors that nobody asked for, in order."""
        return tuple(self._unread)


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """A checkpoint as a mapping from name to tensor, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = tuple(checkpoint.names())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def has_own_load_weights(model: PretrainedModel[Any]) -> bool:
    """Whether the author replaced `load_weights`."""
    return type(model).load_weights is not PretrainedModel.load_weights


def load_into_model(
    model: PretrainedModel[Any],
    weights: Mapping[str, torch.Tensor],
    weight_map: WeightMap | None = None,
) -> None:
    """Fill a built model from tensors in memory and make it ready to run.

    Raises:
        WeightError: If tensors and parameters do not fit, listing all that do not.
    """
    config = model.model_config
    load_into(
        model,
        weights,
        weight_map or getattr(model, "llmfw_weight_map", None),
        device=config.device,
        mapping=config.mapping,
    )


def load_by_author(
    model: PretrainedModel[Any], weights: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """Run the author's own `load_weights` and check that it filled all parameters.

    Returns:
        Names of the tensors that it never read; a warning names the first of them.

    Raises:
        WeightError: If a floating-point parameter was left untouched.
    """
    materialize(model, model.model_config.device)
    tie_heads(model)
    tensors = ReadTensors(weights)
    with torch.no_grad():
        model.load_weights(tensors)
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and bool(parameter.isnan().all())
    ]
    if untouched:
        raise WeightError(
            f"load_weights of {type(model).__name__} left {len(untouched)} parameters unfilled: "
            + ", ".join(untouched[:8]),
            hint="or drop load_weights: the default loads by names and tells what does not fit",
        )
    if tensors.unread:
        logger.warning(
            "load_weights of %s never read %d tensors of the checkpoint: %s%s",
            type(model).__name__,
            len(tensors.unread),
            ", ".join(tensors.unread[:8]),
            ", ..." if len(tensors.unread) > 8 else "",
        )
    finish_loading(model)
    return tensors.unread


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give every parameter on the meta device memory, NaN so that an unfilled one shows."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if value.is_floating_point():
                    value.fill_(float("nan"))
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def load_dummy(model: PretrainedModel[Any], seed: int = 0, std: float = 0.02) -> None:
    """Random weights, straight on the device: N(0, std), norms' weights one and biases zero."""
    device = model.model_config.device
    materialize(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, std, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    finish_loading(model)
