"""A GGUF file's header: metadata and tensor entries, parsed in one pass and checked.

The `gguf` package knows the types and does the dequantising; its own reader makes several numpy
views for each word of the vocabulary (2 s for 49,000 words, against 0.1 s here) and does not check
the tensors' bounds. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmfw.errors import CheckpointError, reading_cure

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_MAX_NESTING = 4


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor of the file.

    Args:
        name: ggml's name.
        shape: Its shape, outermost dimension first (HF's order; the file has the reverse).
        type_name: ggml's type: "F32", "Q4_1", ...
        offset: Where its data begin in the file, in bytes.
        nbytes: Bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key, and tensors by ggml's name, in the file's order."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFEntry]


def read_gguf_header(file: Path) -> GGUFHeader:
    """Parses the header of one GGUF file.

    Raises:
        CheckpointError: If the file is missing, truncated, big-endian or damaged; names file and
            tensor.
    """
    try:
        with file.open("rb") as stream:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(file, data).header()
    except OSError as exc:
        raise CheckpointError(
            f"{file}: cannot be read: {exc.strerror or exc}",
            hint=reading_cure(exc, "check the path"),
            file=str(file),
        ) from exc
    except (struct.error, UnicodeDecodeError, ValueError) as exc:
        raise CheckpointError(
            f"{file}: damaged or truncated within its header ({exc})",
            hint="download it again",
            file=str(file),
        ) from exc


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != _MAGIC:
            self._refuse("it is no GGUF file")
        self.at = 4
        version = self._scalar(_U32)
        if version not in _VERSIONS:
            self._refuse(f"GGUF version {version} (little-endian) is not served; {_VERSIONS} are")
        tensor_count, field_count = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in metadata:
                self._refuse(f"metadata key '{key}' is there twice")
            metadata[key] = self._value(self._scalar(_U32), 0)
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            self._refuse(f"general.alignment is {alignment}")
        start = (self.at + alignment - 1) // alignment * alignment
        return GGUFHeader(metadata, self._checked(entries, start))

    def _scalar(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def _count(self) -> int:
        """A number of things still to come: none takes less than a byte."""
        count: int = self._scalar(_U64)
        if count > len(self.data) - self.at:
            self._refuse(f"it announces {count} entries, more than it has bytes")
        return count

    def _string(self) -> str:
        size = self._count()
        text = self.data[self.at : self.at + size]
        self.at += size
        return text.decode("utf-8")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > _MAX_NESTING:
            self._refuse(f"value type {kind} in the metadata is not known")
        item = self._scalar(_U32)
        count = self._count()
        if item not in _SCALARS:
            return [self._value(item, depth + 1) for _ in range(count)]
        array = struct.Struct(f"<{count}{_SCALARS[item].format[-1]}")
        values = list(array.unpack_from(self.data, self.at))
        self.at += array.size
        return values

    def _entry(self) -> GGUFEntry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        rank = self._scalar(_U32)
        if rank > 8:
            self._refuse(f"tensor '{name}' has {rank} dimensions")
        shape = tuple(reversed([int(self._scalar(_U64)) for _ in range(rank)]))
        kind, offset = self._scalar(_U32), self._scalar(_U64)
        if kind not in {int(known) for known in GGMLQuantizationType}:
            self._refuse(f"tensor '{name}' has ggml type {kind}, which gguf does not know", name)
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block or 0 in shape:
            self._refuse(f"tensor '{name}': shape {list(shape)} is not in blocks of {block}", name)
        nbytes = math.prod(shape) // block * block_bytes
        return GGUFEntry(name, shape, GGMLQuantizationType(kind).name, offset, nbytes)

    def _checked(self, entries: list[GGUFEntry], start: int) -> dict[str, GGUFEntry]:
        """Entries with their place in the file: no doubles, no overlaps, none past the end."""
        placed: dict[str, GGUFEntry] = {}
        end = start
        for entry in sorted(entries, key=lambda entry: entry.offset):
            at = start + entry.offset
            if entry.name in placed:
                self._refuse(f"tensor '{entry.name}' is there twice", entry.name)
            if at < end:
                self._refuse(f"tensor '{entry.name}' overlaps the one before it", entry.name)
            end = at + entry.nbytes
            if end > len(self.data):
                self._refuse(
                    f"tensor '{entry.name}' ends at byte {end}, "
                    f"the file has {len(self.data)}: truncated",
                    entry.name,
                )
            placed[entry.name] = GGUFEntry(
                entry.name, entry.shape, entry.type_name, at, entry.nbytes
            )
        return {entry.name: placed[entry.name] for entry in entries}

    def _refuse(self, what: str, tensor: str | None = None) -> NoReturn:
        raise CheckpointError(
            f"{self.file}: {what}", hint="download it again", file=str(self.file), tensor=tensor
        )
