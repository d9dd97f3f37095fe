"""Logging to stderr, and the switches that every command shares: --log-level, --quiet, --debug."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@dataclass
class State:
    """What the switches say, for this process."""

    debug: bool = False
    quiet: bool = False


state = State()


def set_up(level: Level, *, debug: bool, quiet: bool) -> None:
    """Send llmfw's log lines to stderr at `level`; other libraries' loggers are left alone."""
    state.debug, state.quiet = debug, quiet
    logger = logging.getLogger("llmfw")
    logger.setLevel(level.value.upper())
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _ToStderr)]
    logger.addHandler(_ToStderr(logger.level))


@contextmanager
def told_to(show: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile give `show` what happens ("compiled norm.cu ..."), whatever --log-level is."""
    logger, handler = logging.getLogger("llmfw"), _ToFunction(show)
    before = logger.level
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _ToFunction(logging.Handler):
    """Gives the text of each line to a function."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


class _ToStderr(logging.Handler):
    """Writes to whatever stderr is now, so that captured and redirected streams are met.

    Args:
        threshold: The level from which lines are written, of loggers that have none of their own.
    """

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self._threshold = threshold

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written; `told_to` lowers the loggers' level, but not this one."""
        own = logging.getLogger(record.name).level if record.name != "llmfw" else 0
        return record.levelno >= (own or self._threshold)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"llmfw: {record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and state.debug:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            sys.stderr.write(text + "\n")
        except Exception:
            self.handleError(record)
