"""Errors as people and scripts see them: message and cure on stderr, an exit code a class."""

from __future__ import annotations

import errno
import sys
import traceback

import typer

from llmfw_cli.logs import state

USAGE = 2
INTERNAL = 16
INTERRUPTED = 130
BROKEN_PIPE = 141

_PERMISSION = "choose another place, or ask for permission to read and write there"
_ROOM = "make room there, or choose another place; LLMFW_CACHE says where the cache is"
_CURES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
}


def report(error: BaseException) -> int:
    """Tell of `error` on stderr; returns the exit code.

    Errors of llmfw are a message and its cure. So is what the system forbids or has no room for.
    Anything else is a fault of ours or of a plugin and is called an internal error. The traceback
    is shown with --debug only.
    """
    from llmfw.errors import LlmfwError

    if state.debug:
        traceback.print_exception(error)
    if isinstance(error, LlmfwError):
        _say(f"error: {error.message}")
        for line in (error.hint or "").splitlines():
            _say(f"  {line}")
        code = error.exit_code
    elif isinstance(error, OSError) and error.errno in _CURES:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror}")
        _say(f"  {_CURES[error.errno]}")
        code = USAGE
    else:
        _say(f"internal error: {type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            _say(f"  {note}")
        code = INTERNAL
        if not state.debug:
            _say("  --debug shows the traceback; please report it")
    return code


def report_usage(error: typer.TyperException) -> int:
    """Tell of a command line that cannot be parsed, in the form of our own errors."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help itself, for a command given nothing
        if error.message:
            _say(error.message)
        return int(error.exit_code)
    _say(f"error: {error.format_message()}")
    context = getattr(error, "ctx", None)
    command = "llmfw" if context is None else context.command_path
    options = context.command.params if context is not None else ()
    if "unexpected extra argument" in error.format_message() and any(
        "--model" in option.opts for option in options
    ):
        _say("  a model is named with --model")
    _say(f"  {command} --help shows what there is")
    return int(error.exit_code)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
