"""What a recording keeps of modules that are given a residual beside their hidden states."""

from __future__ import annotations

import torch
from torch import nn

from llmfw.testing.trace import Recording, _module_hooks


class Branch(nn.Module):
    """Adds the residual to what it gives, as Bloom's attention and MLP do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = self.inner(hidden)
        return out if residual is None else out + residual


class Norm(nn.Module):
    """Adds the residual before it normalises."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(hidden + residual)


def recorded(module: nn.Module, *args: torch.Tensor) -> Recording:
    recording: Recording = {}

    def put(path: str, stage: str, value: torch.Tensor) -> None:
        recording[f"{path}|{stage}"] = value

    with _module_hooks("it", module, put):
        module(*args)
    return recording


def test_a_residual_that_a_branch_adds_at_its_end_is_in_neither_stage() -> None:
    hidden, residual = torch.randn(3, 4), torch.randn(3, 4)
    found = recorded(Branch(), hidden, residual)
    assert set(found) == {"it|input"}
    torch.testing.assert_close(found["it|input"], hidden)


def test_a_branch_without_one_is_recorded_whole() -> None:
    assert set(recorded(Branch(), torch.randn(3, 4))) == {"it|input", "it|output"}


def test_a_norm_gets_the_sum() -> None:
    hidden, residual = torch.randn(3, 4), torch.randn(3, 4)
    found = recorded(Norm(), hidden, residual)
    torch.testing.assert_close(found["it|input"], hidden + residual)
    assert "it|output" in found
