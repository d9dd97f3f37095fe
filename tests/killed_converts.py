"""Conversions that are killed: `python tests/killed_converts.py SOURCE FOLDER SEED COUNT`.

Each one runs in a process of its own, which ends itself by SIGKILL before or after one of its calls
that change the disk, drawn at random; then another process goes on. One line of JSON is printed for
each: where it ended, what was left, and whether what then came is as it should be.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfw.errors import LlmfwError
from llmfw.models import load_model
from llmfw.models.convert import convert_checkpoint
from llmfw.weights.staging import staging_path

WATCHED = ("pwrite", "fsync", "rename", "unlink", "open")


class Killer:
    """Counts calls of `os` that change the disk, and ends the process at one of them."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.count = at, after, 0

    def watch(self) -> None:
        for name in WATCHED:
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.count += 1
            if self.count == self.at and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **more)
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def in_a_process(work: Callable[[], None]) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as exc:
            sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a conversion failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def accepted(folder: Path) -> bool:
    try:
        load_model(folder, kernels="reference")
    except LlmfwError:
        return False
    return True


def one(source: Path, out: Path, whole: dict[str, bytes], at: int, after: bool) -> dict[str, Any]:
    killer = Killer(at, after)

    def killed() -> None:
        killer.watch()
        convert_checkpoint(source, out, sync_bytes=1)

    ended_by = in_a_process(killed)
    # The step after the rename removes the journal: a directory that is there is whole.
    weights = {name: value for name, value in whole.items() if name != "lock"}
    found = contents(out) if out.exists() else None
    fair = found is None or weights.items() <= found.items()
    half = staging_path(out)
    told = {
        "at": at,
        "after": after,
        "signal": ended_by,
        "there": out.exists(),
        "whole_if_there": fair,
        "half_refused": not half.exists()
        or contents(half).keys() >= whole.keys()
        or not accepted(half),
    }
    resumed = 0
    if not out.exists():
        resumed = convert_checkpoint(source, out).resumed
    told |= {"resumed": resumed, "accepted_then": accepted(out)}
    told["same_then"] = weights.items() <= contents(out).items()
    told["left"] = sorted(contents(out).keys() - whole.keys())
    return told


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    drawn = random.Random(int(sys.argv[3]))
    convert_checkpoint(source, folder / "whole")
    whole = contents(folder / "whole")
    calls = count_of_calls(source, folder)
    for number in range(int(sys.argv[4])):
        at, after = drawn.randint(1, calls), drawn.random() < 0.5
        told = one(source, folder / f"out{number}", whole, at, after)
        sys.stdout.write(json.dumps(told) + "\n")
    last = one(source, folder / "never", whole, calls + 1, False)
    sys.stdout.write(json.dumps(last) + "\n")


def count_of_calls(source: Path, folder: Path) -> int:
    """How many calls a whole conversion makes."""
    killer = Killer(at=-1, after=False)
    note = folder / "calls"

    def counted() -> None:
        killer.watch()
        convert_checkpoint(source, folder / "counted", sync_bytes=1)
        note.write_text(str(killer.count))

    in_a_process(counted)
    return int(note.read_text())


if __name__ == "__main__":
    main()
