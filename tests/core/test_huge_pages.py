"""Large pages under parameters: asked for where it pays, off by a variable, never a failure."""

from __future__ import annotations

import pytest
import torch

from llmfw.errors import UsageError
from llmfw.weights import huge_pages
from llmfw.weights.huge_pages import SMALLEST, advise_huge_pages


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """What the system was asked: start and length."""
    calls: list[tuple[int, int]] = []

    def madvise(start, length, advice):
        calls.append((start.value, length.value))
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: (madvise, 14))
    return calls


def test_whole_pages_inside_of_the_tensor(asked) -> None:
    tensor = torch.empty(SMALLEST + 5, dtype=torch.uint8)
    assert advise_huge_pages(tensor)
    ((start, length),) = asked
    assert start % 4096 == length % 4096 == 0
    assert tensor.data_ptr() <= start
    assert start + length <= tensor.data_ptr() + tensor.nbytes
    assert length > SMALLEST - 2 * 65536


def test_not_for_small_ones_other_devices_or_when_switched_off(asked, monkeypatch) -> None:
    assert not advise_huge_pages(torch.empty(100))
    assert not advise_huge_pages(torch.empty(SMALLEST, device="meta"))
    monkeypatch.setenv("LLMFW_HUGE_PAGES", "off")
    assert not advise_huge_pages(torch.empty(SMALLEST))
    assert asked == []
    monkeypatch.setenv("LLMFW_HUGE_PAGES", "maybe")
    with pytest.raises(UsageError, match="LLMFW_HUGE_PAGES"):
        advise_huge_pages(torch.empty(SMALLEST))


def test_a_system_without_them(monkeypatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: (None, 0))
    assert not advise_huge_pages(torch.empty(SMALLEST))


def test_this_system(monkeypatch) -> None:
    tensor = torch.empty(SMALLEST + 5, dtype=torch.uint8)
    assert advise_huge_pages(tensor) in (True, False)
    assert int(tensor.fill_(7).sum()) == 7 * len(tensor)
