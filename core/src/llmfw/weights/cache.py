"""Folders of the cache that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llmfw.cache import cache_dir
from llmfw.errors import ConfigError

_STAGING = ".new-"
_STALE_SECONDS = 24 * 3600


def cached_folder(group: str, stem: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder `group/stem-key` of the cache, made by `fill` where it is not there yet.

    `fill` works on a private folder that is then moved into place in one step: another process
    never sees half of it, and of two processes that make it at once the second throws its own away.
    Folders of the same stem with other keys are older versions and are removed.

    Raises:
        ConfigError: If the cache cannot be written.
    """
    target = cache_dir() / group / f"{stem}-{key}"
    try:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target.parent))
    except OSError as exc:
        raise _unwritable(target.parent, exc) from exc
    try:
        fill(staging)
        staging.chmod(0o755)
        _move(staging, target)
    except OSError as exc:
        raise _unwritable(target.parent, exc) from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for older in target.parent.glob(f"{stem}-*"):
        if older != target and len(older.name) == len(target.name):
            shutil.rmtree(older, ignore_errors=True)
    return target


def _sweep(folder: Path) -> None:
    """Removes what a killed process has left half made, a day later."""
    for left in folder.glob(f"{_STAGING}*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _move(staging: Path, target: Path) -> None:
    try:
        os.rename(staging, target)
    except OSError:
        if not target.is_dir():
            raise


def _unwritable(folder: Path, exc: OSError) -> ConfigError:
    return ConfigError(
        f"{folder}: the cache cannot be written: {exc.strerror or exc}",
        hint="set LLMFW_CACHE to a directory with free space",
    )
