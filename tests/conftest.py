"""What every test run shares: no network, one thread, none of the caller's settings."""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEPT = {"LLMFW_CACHE", "LLMFW_TORCH", "LLMFW_TORCH_INDEX_URL"}

# Before anything imports torch or transformers, hence at import time and not in a fixture.
for name in [name for name in os.environ if name.startswith("LLMFW_") and name not in KEPT]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLMFW_CACHE", str(ROOT / ".pytest_cache" / "llmfw"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no NVIDIA GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_nvidia_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def has_nvidia_gpu() -> bool:
    """Whether torch can use an NVIDIA GPU; looks for one before it imports torch, which is slow."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random weights in every run: torch seeds itself from the system's entropy."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
