"""What goes to stdout (the result, nothing else) and what goes to stderr (progress, notes)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from llmfw_cli.errors import BROKEN_PIPE
from llmfw_cli.logs import state, told_to

Progress = Callable[[int, int, str], None]
TOLD = 60  # characters of a bar's title, so that the bar has room


def write(text: str) -> None:
    """Write a piece of the result to stdout at once.

    A reader that went away (`| head`) ends the command quietly, with the exit code of a broken
    pipe.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


def write_json(value: Any) -> None:
    """Write one JSON object and a newline to stdout."""
    write(json.dumps(value, ensure_ascii=False, indent=None, default=str) + "\n")


def write_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write an aligned table in plain text; the last column is not padded."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        write("  ".join(cells).rstrip() + "\n")


def write_facts(facts: dict[str, Any], indent: str = "") -> None:
    """Write names and values, one a line, the values aligned."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        write(f"{indent}{name.ljust(width)}  {value}\n")


def note(text: str) -> None:
    """Write a line for people to stderr, unless --quiet."""
    if not state.quiet:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def shows_progress() -> bool:
    """Whether stderr is a terminal and nobody asked for quiet."""
    return sys.stderr.isatty() and not state.quiet


@contextmanager
def progress(title: str) -> Iterator[Progress | None]:
    """A progress bar on stderr as a callback (done, total, name); None where none is shown.

    Until it is first called, the bar's title tells what happens: kernels that are compiled, say.
    """
    if not shows_progress():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)

        def advance(done: int, total: int, name: str) -> None:
            bars.update(task, description=title, completed=done, total=total)

        def tell(what: str) -> None:
            bars.update(task, description=escape(f"{title}: {what}"[:TOLD]))

        with told_to(tell):
            yield advance
