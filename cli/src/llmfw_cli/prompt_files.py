"""Prompts from files: text, token ids as csv or npy, and jsonl, told apart by their suffix."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfw.errors import UsageError

#: A prompt as `LLM.generate` takes it.
FilePrompt = str | list[int]


class PaddedIds(list[int]):
    """Token ids of a table's row, at whose ends the tokenizer's padding token may stand."""


PADDING = -1  # what fills the shorter rows of a table of ids that we write
_JSON_KEYS = ("prompt", "prompt_token_ids")


def read_prompt_file(file: Path) -> list[FilePrompt]:
    """The prompts of a file.

    .csv: token ids, a prompt a line. .npy: token ids, a prompt a row; ids below 0 are padding, and
    so is the tokenizer's padding token at a row's ends.
    .jsonl: on each line a text, a list of token ids, or an object with `prompt` or
    `prompt_token_ids`. Any other file is one prompt, UTF-8 text (TensorRT-LLM's run.py takes each
    line of a .txt as one; that is what .jsonl is for).

    Raises:
        UsageError: If it cannot be read; the message names file and line.
    """
    try:
        data = file.read_bytes()
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise usage_error(
            f"--prompt-file {file} cannot be read: {reason}",
            hint="give a file of UTF-8 text, or one that ends in .csv, .npy or .jsonl",
        ) from exc
    reader = _READERS.get(file.suffix.lower())
    prompts = _read_text(data, file) if reader is None else reader(data, file)
    if not prompts:
        raise usage_error(f"--prompt-file {file} holds no prompt", hint="give at least one")
    return prompts


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text without the newline at its end."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise usage_error(
            f"{where} is not UTF-8 text: byte {exc.start} is 0x{data[exc.start]:02x}",
            hint="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from exc
    return text.removesuffix("\n").removesuffix("\r")


def usage_error(message: str, hint: str) -> UsageError:
    """A UsageError; the errors are imported when there is one."""
    from llmfw.errors import UsageError

    return UsageError(message, hint=hint)


def _read_text(data: bytes, file: Path) -> list[FilePrompt]:
    text = decode_text(data, f"--prompt-file {file}")
    return [text] if text else []


def _read_csv(data: bytes, file: Path) -> list[FilePrompt]:
    prompts: list[FilePrompt] = []
    lines = decode_text(data, f"--prompt-file {file}").splitlines()
    for number, cells in enumerate(csv.reader(lines), 1):
        words = [cell.strip() for cell in cells if cell.strip()]
        wrong = next((word for word in words if not word.isdecimal()), None)
        if wrong is not None:
            raise usage_error(
                f"--prompt-file {file}, line {number}: {wrong!r} is not a token id",
                hint="a .csv has token ids, a prompt a line; give texts as .jsonl",
            )
        if words:
            prompts.append([int(word) for word in words])
    return prompts


def _read_jsonl(data: bytes, file: Path) -> list[FilePrompt]:
    prompts: list[FilePrompt] = []
    for number, line in enumerate(decode_text(data, f"--prompt-file {file}").split("\n"), 1):
        if not line.strip():
            continue
        where = f"--prompt-file {file}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as exc:
            raise usage_error(
                f"{where}: no JSON at column {exc.colno}: {exc.msg}",
                hint='a .jsonl has one JSON value a line, e.g. {"prompt": "text"}',
            ) from exc
        prompts.append(_prompt_of(value, where))
    return prompts


def _prompt_of(value: Any, where: str) -> FilePrompt:
    if isinstance(value, Mapping):
        known = [key for key in _JSON_KEYS if key in value]
        if len(known) != 1:
            raise usage_error(
                f"{where}: an object with the keys {sorted(value)}",
                hint='give {"prompt": text} or {"prompt_token_ids": ids}',
            )
        value = value[known[0]]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise usage_error(
        f"{where}: {json.dumps(value)[:60]} is no prompt",
        hint="a prompt is a text or a list of token ids",
    )


def _read_npy(data: bytes, file: Path) -> list[FilePrompt]:
    import io

    import numpy as np

    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise usage_error(
            f"--prompt-file {file} is no .npy file of numbers",
            hint="write it with numpy.save(file, token_ids)",
        ) from exc
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise usage_error(
            f"--prompt-file {file} holds {array.dtype} {list(array.shape)}",
            hint="token ids are whole numbers [prompts, tokens]",
        )
    rows = array if array.ndim == 2 else array[None]
    return [PaddedIds(row[row >= 0].tolist()) for row in rows]


_READERS: Mapping[str, Callable[[bytes, Path], list[FilePrompt]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".npy": _read_npy,
}
