"""Where llmfw keeps what it can make again: unpacked checkpoints, compiled kernels, timings.

Beside the user's own cache there are ready-made files, which engine directories bring along. A
file's name says what it was made from and for (digests of sources, processor, versions), so files
of several engines never stand for one another, and the table of them may be the whole process's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_ready_made: dict[str, Path] = {}
_used: dict[str, Path] = {}


def cache_dir() -> Path:
    """`LLMFW_CACHE`, or the platform's cache directory for llmfw."""
    named = os.environ.get("LLMFW_CACHE")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("llmfw", appauthor=False)


def find(name: str) -> Path | None:
    """A file that is kept, the user's own before a ready-made one; counts as used.

    Args:
        name: Its path inside of the cache, with "/" between the parts.
    """
    own = cache_dir() / name
    there = os.path.isfile(own)  # Path.is_file raises where a folder above may not be entered
    path = own if there else _ready_made.get(name)
    if path is not None:
        _used[name] = path
    return path


def find_ready_made(prefix: str) -> dict[str, Path]:
    """Ready-made files whose names begin so."""
    return {name: path for name, path in _ready_made.items() if name.startswith(prefix)}


def note_used(name: str, path: Path) -> None:
    """Remember that a file was used which `find` did not give."""
    _used[name] = path


def used() -> dict[str, Path]:
    """What this process has used so far, by name."""
    return dict(_used)


def add_ready_made(files: Mapping[str, Path]) -> None:
    """Offer files by their names inside of the cache; those offered before stay."""
    _ready_made.update(files)
