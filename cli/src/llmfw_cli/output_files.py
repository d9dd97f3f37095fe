"""What `run` writes beside the text: token ids and logits."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmfw_cli.prompt_files import PADDING, usage_error

if TYPE_CHECKING:
    import numpy as np

    from llmfw import RequestOutput
    from llmfw_cli.run_options import RunOptions


def check_output_files(options: RunOptions) -> None:
    """Refuse a place that nothing can be written to, before a model is loaded.

    Raises:
        UsageError: If a file's folder cannot be made, or the file not be written.
    """
    files = [options.output_csv, options.output_npy, options.output_logits_npy]
    if options.debug_mode:
        files.append(options.debug_file)
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise usage_error(
                f"{file.parent} cannot be made: {exc.strerror}", hint="name another file"
            ) from exc
        if file.is_dir():
            raise usage_error(f"{file} is a folder", hint="name a file")
        _check_writable(file)


def _check_writable(file: Path) -> None:
    """Open a file as its writer will; one that was not there is not left behind."""
    new = not file.exists()
    try:
        file.open("ab").close()
    except OSError as exc:
        raise usage_error(
            f"{file} cannot be written: {exc.strerror}", hint="name another file"
        ) from exc
    if new:
        file.unlink()


def write_output_files(requests: Sequence[RequestOutput], options: RunOptions) -> None:
    """Write the files that were asked for; a prompt that failed has no lines in them."""
    answered = [request for request in requests if request.error is None]
    rows = list(_token_rows(answered))
    if options.output_csv is not None:
        with options.output_csv.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    if options.output_npy is not None:
        _save(options.output_npy, _table(rows))
    if options.output_logits_npy is not None:
        _write_logits(answered, options.output_logits_npy)


def _token_rows(requests: Sequence[RequestOutput]) -> Iterator[list[int]]:
    for request in requests:
        for output in request.outputs:
            yield [*request.prompt_token_ids, *output.token_ids]


def _table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    import numpy as np

    table = np.full((len(rows), max(map(len, rows), default=0)), PADDING, dtype=np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _write_logits(requests: Sequence[RequestOutput], file: Path) -> None:
    import numpy as np

    context = [r.context_logits for r in requests if r.context_logits is not None]
    made = [
        output.generation_logits
        for request in requests
        for output in request.outputs
        if output.generation_logits is not None
    ]
    if context:
        _save(file.with_name(f"{file.stem}_context.npy"), np.concatenate(context))
    if made:
        longest = max(map(len, made))
        table = np.zeros((len(made), longest, made[0].shape[1]), dtype=np.float32)
        for line, rows in zip(table, made, strict=True):
            line[: len(rows)] = rows
        _save(file.with_name(f"{file.stem}_generation.npy"), table)


def _save(file: Path, array: np.ndarray) -> None:
    """Save under exactly this name: numpy.save would add a suffix of its own."""
    import numpy as np

    with file.open("wb") as out:
        np.save(out, array)
