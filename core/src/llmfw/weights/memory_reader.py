"""Tensors that are in memory already, read like any other checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import TensorInfo


class MemoryCheckpoint:
    """A dict of tensors (a state dict) as a checkpoint of format "memory"."""

    format = "memory"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        wrong = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if wrong:
            raise CheckpointError(
                f"not tensors: {', '.join(wrong)}", hint="pass a mapping of names to torch tensors"
            )
        self._tensors = dict(tensors)
        self.path = Path("<memory>")

    def names(self) -> Sequence[str]:
        """All names, in the order of the dict."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """The tensor's shape, dtype and size."""
        tensor = self.tensor(name)
        return TensorInfo(tuple(tensor.shape), tensor.dtype, "", tensor.nbytes)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor itself, detached; not a copy."""
        if name not in self._tensors:
            raise CheckpointError(f"no tensor '{name}' among those given")
        return self._tensors[name].detach()

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """A view of part of it."""
        return self.tensor(name).narrow(dim, start, stop - start)
