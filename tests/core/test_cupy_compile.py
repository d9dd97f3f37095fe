"""How CUDA kernels overlap with the one before: by compute capability, and `LLMFW_PDL`."""

from __future__ import annotations

import pytest
import torch

from llmfw.errors import UsageError
from llmfw.kernels.cupy.compile import constants_of, overlap

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ((9, 0), None, 1),
        ((9, 0), "0", 0),
        ((9, 0), "2", 2),
        ((10, 0), "1", 1),
        ((8, 9), None, 0),
        ((8, 0), "2", 0),
    ],
)
def test_launches_overlap_where_the_device_can_and_nobody_forbids(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], asked: str | None, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("LLMFW_PDL", raising=False)
    if asked is not None:
        monkeypatch.setenv("LLMFW_PDL", asked)
    assert overlap(GPU) == expected
    constants = constants_of(GPU, torch.bfloat16, {"ROWS": 4})
    assert constants == {"DTYPE": 0, "PDL": expected, "ROWS": 4}


def test_a_value_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_PDL", "on")
    with pytest.raises(UsageError, match="LLMFW_PDL is 'on'") as caught:
        overlap(torch.device("cpu"))
    assert "0, 1, 2" in str(caught.value.hint)
