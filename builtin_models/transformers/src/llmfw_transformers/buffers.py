"""Tables that transformers computes from the configuration: they are in no checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmfw.errors import ConfigError
from llmfw_transformers.probe import Unservable

_GROWING = ("dynamic", "longrope")


Table = tuple[nn.Module, str, torch.Tensor]


def computed_buffers(model: Any, device: torch.device) -> list[Table]:
    """The values of every buffer on `device`, as transformers computes them after loading.

    The model's own stay on the meta device. Those that a checkpoint holds are filled from there.

    Raises:
        ConfigError: If one of the others is left without values.
    """
    tables: list[Table] = []
    for path, module in model.named_modules():
        declared = {name: each for name, each in module._buffers.items() if each is not None}
        if not declared:
            continue
        for name, buffer in declared.items():
            module._buffers[name] = _unset(buffer, device)
        with torch.device(device):
            model._init_weights(module)
        for name, buffer in declared.items():
            value = module._buffers[name]
            assert value is not None
            if name in module._non_persistent_buffers_set and _is_unset(value):
                raise ConfigError(
                    f"transformers does not compute the buffer {path}.{name} after loading",
                    hint="write a plugin of its own: llmfw new --from MODEL",
                )
            tables.append((module, name, value))
            module._buffers[name] = buffer
    return tables


def _unset(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    if value.is_floating_point():
        value.fill_(float("nan"))
    return value


def _is_unset(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() and bool(buffer.isnan().any())


def freeze_rope(model: nn.Module, longest: int | None) -> None:
    """Keep rotary embeddings at the frequencies of short sequences, the only ones that will run.

    transformers chooses them by the longest sequence of a batch, which would make a request's
    answer depend on the others.

    Raises:
        Unservable: If longer ones may run.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        each = kinds.values() if isinstance(kinds, dict) else (kinds,)
        growing = [kind for kind in each if kind in _GROWING]
        if not growing:
            continue
        limit = _short(module)
        if longest is None or longest > limit:
            raise Unservable(
                f"{growing[0]} rope changes with the length above {limit} tokens;"
                f" sequences of up to {limit} are served: --max-model-len {limit}"
            )
        frozen = "frozen"
        module.rope_type = dict.fromkeys(kinds, frozen) if isinstance(kinds, dict) else frozen  # type: ignore[assignment]


def _short(module: Any) -> int:
    """The longest sequence that all of a module's rotary embeddings take as short."""
    config = module.config
    rope = dict(config.rope_parameters)
    each = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    default = config.max_position_embeddings
    return min(int(one.get("original_max_position_embeddings") or default) for one in each)
