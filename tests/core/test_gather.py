"""Parts put together: a tensor is whole once, however its parts come."""

from __future__ import annotations

import pytest
import torch

from llmfw.errors import WeightError
from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.expressions import Source, Transpose
from llmfw.weights.gather import Gather

SOURCE = Source("w", TensorInfo((4, 3), torch.float32, "", 48))


def gathered() -> tuple[Gather, dict[str, torch.Tensor]]:
    whole: dict[str, torch.Tensor] = {}
    return Gather(lambda source, value: whole.update({source.name: value.clone()})), whole


def test_parts_in_any_order_and_twice() -> None:
    sink, whole = gathered()
    value = torch.randn(4, 3)
    for start in (2, 0, 2):
        if not whole:
            SOURCE.narrow(0, start, start + 2).scatter(value[start : start + 2], sink)
    assert torch.equal(whole["w"], value)
    assert sink.incomplete() == []


def test_the_same_part_twice_is_not_the_whole() -> None:
    sink, whole = gathered()
    for _ in range(2):
        SOURCE.narrow(0, 0, 2).scatter(torch.ones(2, 3), sink)
    assert whole == {}
    assert sink.incomplete() == ["w"]


def test_columns_of_a_transposed_tensor() -> None:
    sink, whole = gathered()
    value = torch.randn(3, 4)
    for start in (0, 1, 2):
        Transpose(SOURCE).narrow(0, start, start + 1).scatter(value[start : start + 1], sink)
    assert torch.equal(whole["w"], value.T)


def test_parts_of_different_dtypes_are_refused() -> None:
    sink, _ = gathered()
    SOURCE.narrow(0, 0, 2).scatter(torch.ones(2, 3), sink)
    with pytest.raises(WeightError, match=r"w: its parts are loaded as torch\.float32"):
        SOURCE.narrow(0, 2, 4).scatter(torch.ones(2, 3).half(), sink)
