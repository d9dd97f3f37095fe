"""Where llmfw keeps what it can make again: unpacked checkpoints, compiled kernels, timings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`LLMFW_CACHE`, or the platform's cache directory for llmfw."""
    named = os.environ.get("LLMFW_CACHE")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("llmfw", appauthor=False)
