"""A directory in the making: it appears whole or not at all, and a killed process's work is kept.

The work lies in a hidden directory beside the target. A journal there says for whom it is and what
is done; another process that wants the very same goes on from there. The last step is one rename.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmfw.errors import CheckpointError

logger = logging.getLogger("llmfw.weights")

JOURNAL = "journal.jsonl"
LOCK = "lock"


def staging_path(target: Path) -> Path:
    """Where the work for `target` lies until it is whole."""
    return target.parent / f".{target.name}.part"


class Staging:
    """The work on one directory; one process at a time.

    Args:
        target: The directory that is to appear.
        identity: What it is made from and how, as JSON values; work of another identity is thrown
            away.

    Raises:
        CheckpointError: If there is something at `target` already, or another process is at work.
        OSError: If the directory cannot be made.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        self.target = target
        self.folder = staging_path(target)
        refuse_existing(target)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / LOCK, target)
        self.done: dict[str, Any] = self._resume(identity)
        done = [{"done": name, "value": value} for name, value in self.done.items()]
        self._journal = (self.folder / JOURNAL).open("w", encoding="utf-8")
        self._append([{"identity": identity}, *done])

    def mark(self, finished: Mapping[str, Any]) -> None:
        """Note what is done and on the disk, with a value to remember for each."""
        self._append([{"done": name, "value": value} for name, value in finished.items()])
        self.done |= finished

    def commit(self) -> None:
        """Give the directory its name; from then on it is there, whole.

        Raises:
            CheckpointError: If something has appeared there meanwhile.
        """
        sync_tree(self.folder)
        refuse_existing(self.target)
        os.rename(self.folder, self.target)
        for name in (JOURNAL, LOCK):
            (self.target / name).unlink()
        sync(self.target.parent)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()
        left = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if exc is not None and left <= {JOURNAL, LOCK}:
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing has been made
        os.close(self._lock)

    def _append(self, entries: list[dict[str, Any]]) -> None:
        self._journal.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _resume(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What an earlier process has finished; all is removed where it made something else."""
        entries = _read_journal(self.folder / JOURNAL)
        if entries and entries[0].get("identity") == json.loads(json.dumps(identity)):
            return {entry["done"]: entry["value"] for entry in entries[1:]}
        left = [path for path in self.folder.iterdir() if path.name != LOCK]
        if left:
            logger.warning(
                "%s: the work of an earlier run is thrown away: it was made from something else, "
                "or with other options",
                self.folder,
            )
        for path in left:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return {}


def refuse_existing(target: Path) -> None:
    """Nothing is written over.

    Raises:
        CheckpointError: If there is a file, or a directory with something in it.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            f"{target}: is there already", hint="choose another directory, or remove it first"
        )


def unwritable(target: Path, exc: OSError) -> CheckpointError:
    """What to say where the system refuses to write, with the cure that fits its reason."""
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
    room = "make room and run it again: what is done is kept"
    return CheckpointError(
        f"{target}: cannot be written: {exc.strerror or exc}",
        hint=room if full else "choose a directory where you may write",
        file=str(target),
    )


def write_json(file: Path, value: Any) -> None:
    """Write a JSON value as text."""
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Return once a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Return once all of a directory is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries up to the first that is not whole."""
    entries: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def _locked(path: Path, target: Path) -> int:
    """A lock that the system takes back when the process ends, however it ends."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(handle)
        raise CheckpointError(
            f"{target}: another process is making it right now",
            hint="wait for it, or choose another directory",
        ) from exc
    return handle
