"""Where prompts come from: arguments, options, files and standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmfw.errors import UsageError

STDIN = "-"


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts in the order given: texts (where "-" stands for standard input), then files.

    With neither, standard input is the prompt if something is piped in. One newline at the end of a
    file or of standard input is not part of the prompt.

    Raises:
        UsageError: If there is no prompt, or one that cannot be read.
    """
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise _usage_error(
                "there is no prompt",
                hint="give --prompt TEXT or --prompt-file FILE, or pipe the prompt in",
            )
        texts = [STDIN]
    if list(texts).count(STDIN) > 1:
        raise _usage_error("standard input is named twice as a prompt", hint="name it once")
    prompts = [_read_stdin() if text == STDIN else text for text in texts]
    return prompts + [_read_file(file) for file in files]


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    if not data:
        raise _usage_error(
            "standard input is empty", hint="pipe the prompt in, or give --prompt TEXT"
        )
    return _decode(data, "standard input")


def _read_file(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise _usage_error(
            f"--prompt-file {file} cannot be read: {reason}", hint="give a file of UTF-8 text"
        ) from exc
    return _decode(data, f"--prompt-file {file}")


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise _usage_error(
            f"{where} is not UTF-8 text: byte {exc.start} is 0x{data[exc.start]:02x}",
            hint="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from exc
    return text.removesuffix("\n").removesuffix("\r")


def _usage_error(message: str, hint: str) -> UsageError:
    from llmfw.errors import UsageError

    return UsageError(message, hint=hint)
