"""State whose size does not grow with the request: what recurrent modules keep instead of K and V.

A module declares it with `state_spec()`; the engine gives every running request one slot, and the
module finds its tensors in `AttentionMetadata.states` and the batch's slots in `state_slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from llmfw.attention.backend import zeros

_ALIGNMENT = 64  # bytes; each tensor of a slot starts on a cache line


@dataclass(frozen=True)
class StateTensor:
    """Shape and dtype of one tensor of a module's state, for one request."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of it in a slot, rounded up to whole cache lines."""
        size = prod(self.shape) * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class StateSpec:
    """What one recurrent module keeps of each request, by name; zeros where a request begins.

    on_device: the module takes lengths and slots from the batch's tensors on the device alone, by
        ops of core or in the same way, so that its steps can be captured as CUDA graphs.
    """

    tensors: Mapping[str, StateTensor]
    on_device: bool = False

    @property
    def bytes_per_request(self) -> int:
        """Bytes of all of it, for one request."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


class StateCache:
    """The slots of all requests, in one buffer: a slot is cleared at once, whatever the layers.

    Args:
        specs: What each layer keeps, by layer index.
        num_slots: Requests that have state at the same time, padding included.
        device: Where it lives.

    Attributes:
        layers: By layer index the tensors by name, each [slots, *shape]; views of the buffer, so
            that only their first stride is not that of a contiguous tensor.
    """

    def __init__(
        self, specs: Mapping[int, StateSpec], num_slots: int, device: torch.device
    ) -> None:
        words = slot_bytes(specs) // torch.int64.itemsize
        self._slots = zeros((num_slots, words), torch.int64, device)
        self.layers: dict[int, dict[str, torch.Tensor]] = {}
        offset = 0
        for layer, spec in specs.items():
            self.layers[layer] = {}
            for name, tensor in spec.tensors.items():
                end = offset + tensor.num_bytes // torch.int64.itemsize
                flat = self._slots[:, offset:end].view(tensor.dtype)[:, : prod(tensor.shape)]
                self.layers[layer][name] = flat.view(num_slots, *tensor.shape)
                offset = end

    def clear(self, slots: torch.Tensor) -> None:
        """Zero the slots (int64, on the device) of requests that begin."""
        self._slots.index_fill_(0, slots, 0)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots (int64, on the device), all at once: a source may also be a target."""
        self._slots.index_copy_(0, targets, self._slots.index_select(0, sources))


def slot_bytes(specs: Mapping[int, StateSpec]) -> int:
    """Bytes that one request's state takes over all layers."""
    return sum(spec.bytes_per_request for spec in specs.values())
