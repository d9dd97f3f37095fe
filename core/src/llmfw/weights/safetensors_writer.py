"""Writing a safetensors file by pieces: the header first, then each tensor at its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.checksums import bytes_of
from llmfw.weights.safetensors_header import DTYPE_CODES, infos_of, read_header_text

Declared = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_AT_ONCE = 1 << 30  # Linux writes at most 2 GiB a call


def header_text(tensors: Declared, metadata: Mapping[str, str] | None = None) -> bytes:
    """The JSON of a file that holds these tensors, in this order, without gaps.

    It is filled up with spaces so that the data begin at a multiple of 8 bytes.

    Args:
        tensors: Shape and dtype by name.
        metadata: Of the file; {"format": "pt"} when left out.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        code = DTYPE_CODES[dtype]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def by_alignment(tensors: Declared) -> Declared:
    """The same, wide dtypes first, so that each tensor begins at a multiple of its elements."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))


class SafetensorsWriter:
    """One file in the making; its tensors may come in any order, and again in a later process.

    Args:
        file: Made when it is not there, or when it is there with another header.
        header: The JSON, from `header_text` or taken from another file.

    Raises:
        CheckpointError: If the header does not describe its data exactly once.
        OSError: If the file cannot be made.
    """

    def __init__(self, file: Path, header: bytes) -> None:
        self.file = file
        self.infos: dict[str, TensorInfo] = infos_of(file, header, _size(header))
        self.is_new = not _is_begun(file, header)
        if self.is_new:
            with file.open("wb") as stream:
                stream.write(len(header).to_bytes(8, "little") + header)
                stream.truncate(_size(header))
        self._handle = os.open(file, os.O_RDWR)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Put a tensor at its place.

        Raises:
            OSError: If it cannot be written.
        """
        info = self.infos[name]
        assert (tuple(value.shape), value.dtype) == (info.shape, info.dtype), name
        left, at = bytes_of(value).data, info.offset
        while left:
            count = os.pwrite(self._handle, left[:_AT_ONCE], at)
            left, at = left[count:], at + count

    def sync(self) -> None:
        """Return once all that was written is on the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _size(header: bytes) -> int:
    """Bytes of the whole file that a header describes."""
    entries = json.loads(header)
    ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    return 8 + len(header) + max(ends, default=0)


def _is_begun(file: Path, header: bytes) -> bool:
    try:
        return read_header_text(file) == (header, _size(header))
    except CheckpointError:
        return False
