"""Articles and their reference summaries: built in, from a file, or a set of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from llmfw.errors import UsageError

BUILT_IN = "builtin"
ARTICLE_COLUMNS = ("article", "document", "text", "dialogue")
SUMMARY_COLUMNS = ("highlights", "summary", "reference")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A text and a summary of it that a person wrote."""

    article: str
    summary: str


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Args:
        name: "builtin", a .jsonl, .csv or .parquet file, or the name of a set of `datasets`.
        config: Which configuration of that set.
        split: Which part of it.
        article, summary: The columns' names; None finds the usual ones.
    """

    name: str = BUILT_IN
    config: str | None = None
    split: str = "test"
    article: str | None = None
    summary: str | None = None


def read_samples(source: Source, count: int) -> list[Sample]:
    """The first `count` samples, fewer if there are no more.

    Raises:
        UsageError: If the data cannot be had or read, or lacks a column.
    """
    where = f"the data {source.name}"
    samples = []
    for number, row in enumerate(islice(_rows(source), count), 1):
        article = _text(row, source.article, ARTICLE_COLUMNS, "--article-column", where, number)
        summary = _text(row, source.summary, SUMMARY_COLUMNS, "--summary-column", where, number)
        samples.append(Sample(article, summary))
    if not samples:
        raise UsageError(f"{where} has no rows", hint="give a file with at least one")
    return samples


def _text(
    row: Row, asked: str | None, usual: Iterable[str], option: str, where: str, number: int
) -> str:
    names = [asked] if asked is not None else [name for name in usual if name in row]
    if not names or names[0] not in row:
        wanted = asked if asked is not None else " or ".join(usual)
        raise UsageError(
            f"row {number} of {where} has no column {wanted}",
            hint=f"name it with {option}; there are: {', '.join(map(str, row))}",
        )
    value = row[names[0]]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"row {number} of {where} has no text in its column {names[0]}",
            hint=f"mend the row, or name another column with {option}",
        )
    return value


def _rows(source: Source) -> Iterator[Row]:
    if source.name == BUILT_IN:
        text = resources.files("llmfw_cli.summarize").joinpath("articles.jsonl").read_text("utf-8")
        return _json_lines(text, "the built-in articles")
    path = Path(source.name)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and not path.exists():
        return _from_datasets(source)
    if reader is None:
        raise UsageError(
            f"the data {path} is of no kind that can be read",
            hint=f"give a file that ends in {', '.join(_READERS)}, or the name of a set",
        )
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="check --data")
    return reader(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}", hint="give a file of UTF-8 text") from exc


def _from_jsonl(path: Path) -> Iterator[Row]:
    return _json_lines(_read_text(path), str(path))


def _json_lines(text: str, where: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise UsageError(
                f"line {number} of {where} is not JSON: {exc}", hint="give one object a line"
            ) from exc
        if not isinstance(row, dict):
            raise UsageError(
                f"line {number} of {where} is no JSON object", hint="give one object a line"
            )
        yield row


def _from_csv(path: Path) -> Iterator[Row]:
    return iter(csv.DictReader(_read_text(path).splitlines(keepends=True)))


def _from_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as exc:
        raise UsageError(
            f"{path} needs pyarrow, which is not installed",
            hint='pip install "llmfw-cli[datasets]"',
        ) from exc
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=64)
        yield from (row for batch in batches for row in batch.to_pylist())
    except (OSError, ArrowException) as exc:
        raise UsageError(f"{path} cannot be read: {exc}", hint="give a parquet file") from exc


def _from_datasets(source: Source) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as exc:
        raise UsageError(
            f"there is no file {source.name}, and a set of that name needs `datasets`, which is "
            "not installed",
            hint='pip install "llmfw-cli[datasets]", or give a .jsonl, .csv or .parquet file',
        ) from exc
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
        yield from rows
    except UsageError:
        raise
    except Exception as exc:  # of hubs, networks and file formats: they have no common base
        raise UsageError(
            f"the set {source.name} cannot be had: {exc}",
            hint="check its name, --data-config, --split and the network, or give a file",
        ) from exc


_READERS = {".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
