"""Logging to stderr, and the switches that every command shares: --log-level, --quiet, --debug."""

from __future__ import annotations

import logging
import sys
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
    logger.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """Writes to whatever stderr is now, so that captured and redirected streams are met."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"llmfw: {record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and state.debug:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            sys.stderr.write(text + "\n")
        except Exception:
            self.handleError(record)
