"""A dict of tensors as a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmfw.errors import CheckpointError
from llmfw.weights import Checkpoint, MemoryCheckpoint


def test_it_is_a_checkpoint_of_a_state_dict() -> None:
    linear = nn.Linear(3, 2)
    checkpoint = MemoryCheckpoint(linear.state_dict())
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.names() == ("weight", "bias")
    info = checkpoint.info("weight")
    assert (info.shape, info.dtype, info.nbytes) == ((2, 3), torch.float32, 24)
    assert torch.equal(checkpoint.slice("weight", 1, 1, 3), linear.weight[:, 1:3])
    assert not checkpoint.tensor("weight").requires_grad


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not tensors: b"):
        MemoryCheckpoint({"a": torch.zeros(1), "b": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        MemoryCheckpoint({}).tensor("x")
