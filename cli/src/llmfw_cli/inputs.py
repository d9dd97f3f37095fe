"""Where prompts come from: arguments, options, files and standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmfw_cli.prompt_files import FilePrompt, decode_text, read_prompt_file, usage_error

STDIN = "-"


def read_prompts(
    texts: Sequence[str], files: Sequence[Path], default: str | None = None
) -> list[FilePrompt]:
    """The prompts in the order given: texts (where "-" stands for standard input), then files.

    With neither, `default` is the prompt, or without one standard input if something is piped in.
    One newline at the end of a text file or of standard input is not part of the prompt.

    Raises:
        UsageError: If there is no prompt, or one that cannot be read.
    """
    if not texts and not files and default is not None:
        return [default]
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise usage_error(
                "there is no prompt",
                hint="give --prompt TEXT or --prompt-file FILE, or pipe the prompt in",
            )
        texts = [STDIN]
    if list(texts).count(STDIN) > 1:
        raise usage_error("standard input is named twice as a prompt", hint="name it once")
    prompts: list[FilePrompt] = [_read_stdin() if text == STDIN else text for text in texts]
    for file in files:
        prompts += read_prompt_file(file)
    return prompts


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    if not data:
        raise usage_error(
            "standard input is empty", hint="pipe the prompt in, or give --prompt TEXT"
        )
    return decode_text(data, "standard input")
