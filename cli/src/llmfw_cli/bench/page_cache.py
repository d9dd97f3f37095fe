"""Files in memory or not: evicting them, reading them, and how much of them is there (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

_SAMPLES = 64
_CHUNK = 8 << 20


def evict(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' pages; `resident` tells whether it did."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that wait to be written cannot be forgotten
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def resident(files: Sequence[Path]) -> float | None:
    """The part of the files' pages that is in memory, 0 to 1, by samples; None: cannot tell."""
    if not hasattr(os, "RWF_NOWAIT") or not files:
        return None
    found = tried = 0
    buffer = bytearray(1)
    for file in files:
        size = file.stat().st_size
        handle = os.open(file, os.O_RDONLY)
        try:
            # from the end, for the kernel reads ahead of what was touched
            for place in range(_SAMPLES - 1, -1, -1):
                tried += 1
                try:
                    got = os.preadv(handle, [buffer], size * place // _SAMPLES, os.RWF_NOWAIT)
                    found += got == 1
                except BlockingIOError:
                    continue
                except OSError:
                    return None  # a file system without it
        finally:
            os.close(handle)
    return found / tried


def read_rate(files: Sequence[Path]) -> float:
    """Read all files from end to end into one buffer; bytes a second. They are in memory then."""
    buffer = bytearray(_CHUNK)
    done = 0
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                done += count
    return done / (time.perf_counter() - started)
