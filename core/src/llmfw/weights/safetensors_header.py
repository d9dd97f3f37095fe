"""A safetensors file's header, read and checked in full before any value is touched.

The format: 8 bytes little-endian header length, that much JSON (name -> dtype, shape,
data_offsets), then the data.
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from llmfw.errors import CheckpointError, reading_cure
from llmfw.weights.checkpoint import TensorInfo

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_CODES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_DOWNLOAD = "the file is damaged or not fully downloaded: download it again"


@dataclass(frozen=True)
class _Range:
    begin: int
    end: int
    name: str


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: If the file is missing, truncated, or its header does not describe its data
            exactly once; names the file and, where there is one, the tensor.
    """
    text, size = read_header_text(file)
    return infos_of(file, text, size)


def read_header_text(file: Path) -> tuple[bytes, int]:
    """The header's JSON as it stands in the file, and the bytes of the whole file.

    Raises:
        CheckpointError: If the file is missing or truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                _refuse(
                    file,
                    f"it has {size} bytes, its header claims {length}: truncated, "
                    "or no safetensors file",
                )
            text = stream.read(length)
    except OSError as exc:
        raise CheckpointError(
            f"{file}: cannot be read: {exc.strerror or exc}",
            hint=reading_cure(exc, _DOWNLOAD),
            file=str(file),
        ) from exc
    return text, size


def infos_of(file: Path, text: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors that a header describes, in the order of their data.

    Args:
        file: The file that it is or was the header of, for messages.
        text: The JSON.
        size: Bytes of the whole file.

    Raises:
        CheckpointError: As `read_header`.
    """
    entries = _parse(file, text)
    entries.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    ranges: list[_Range] = []
    for name, entry in entries.items():
        infos[name], span = _tensor_info(file, name, entry, 8 + len(text))
        ranges.append(span)
    ranges.sort(key=lambda span: (span.begin, span.end))
    _check_ranges(file, ranges, size - 8 - len(text))
    return {span.name: infos[span.name] for span in ranges}


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            _refuse(file, "the header has it twice", twice)
        return dict(items)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise CheckpointError(
            f"{file}: its header is not JSON ({exc})", hint=_DOWNLOAD, file=str(file)
        ) from exc
    if not isinstance(header, dict):
        _refuse(file, "its header is not a JSON object")
    return header


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> tuple[TensorInfo, _Range]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _refuse(file, "its header entry lacks dtype, shape or data_offsets", name)
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if stored not in _DTYPES:
        _refuse(file, f"dtype {stored!r} is not known here", name)
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(file, f"shape {shape!r} or data_offsets {offsets!r} is no list of sizes", name)
    dtype = _DTYPES[stored]
    begin, end = offsets
    if begin == end:
        _refuse(file, f"it has no data (shape {shape}): saved from a partitioned model?", name)
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        _refuse(
            file,
            f"shape {shape} {stored} takes {wanted} bytes, its data_offsets give {end - begin}",
            name,
        )
    info = TensorInfo(tuple(shape), dtype, file.name, wanted, stored, data_start + begin)
    return info, _Range(begin, end, name)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_ranges(file: Path, ranges: Sequence[_Range], data_size: int) -> None:
    """The data must be covered without overlap, gap or excess."""
    at = 0
    for span in ranges:
        if span.begin < at:
            _refuse(
                file,
                f"its data [{span.begin}, {span.end}) overlaps the tensor before it",
                span.name,
            )
        if span.end > data_size:
            _refuse(
                file,
                f"its data ends at byte {span.end}, the file has only {data_size}: truncated",
                span.name,
            )
        if span.begin > at:
            _refuse(file, f"{span.begin - at} bytes before its data belong to no tensor", span.name)
        at = span.end
    if at < data_size:
        _refuse(file, f"{data_size - at} bytes after the last tensor belong to none")


def _refuse(file: Path, what: str, tensor: str | None = None) -> NoReturn:
    where = f"{file}: tensor '{tensor}': " if tensor is not None else f"{file}: "
    raise CheckpointError(where + what, hint=_DOWNLOAD, file=str(file), tensor=tensor)
