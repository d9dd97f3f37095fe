"""Tensors that stream into files one at a time, and are gone on with after a process was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checksums import checksum
from llmfw.weights.safetensors_writer import SafetensorsWriter, by_alignment, header_text
from llmfw.weights.staging import Staging

Progress = Callable[[int, int, str], None]
SYNC_BYTES = 256 << 20  # between two entries of the journal


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is still to be read.

    Args:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype there.
        read: Gives its value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stream_tensors(
    staging: Staging,
    files: Mapping[str, Sequence[PendingTensor]],
    progress: Progress | None,
    sync_bytes: int,
) -> dict[str, dict[str, str]]:
    """Writes tensors into files of a directory in the making, one at a time.

    Args:
        staging: The directory; what it knows to be done is passed over.
        files: The tensors of each file, in the order in which they are best read.
        progress: Called after each tensor with (bytes done, bytes in all, name).
        sync_bytes: How much is written between two entries of the journal.

    Returns:
        Checksums by file and name.

    Raises:
        CheckpointError: If a tensor cannot be read, or the disk has no room.
        OSError: If a file cannot be written.
    """
    total = sum(tensor.nbytes for each in files.values() for tensor in each)
    _require_room(staging, total)
    done, checksums = 0, {}
    for file, tensors in files.items():
        found: dict[str, str] = {}
        with closing(_write_file(staging, file, tensors, sync_bytes)) as written:
            for tensor, value in written:
                found[tensor.name] = value
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total, tensor.name)
        checksums[file] = found
    return checksums


def _write_file(
    staging: Staging, file: str, tensors: Sequence[PendingTensor], sync_bytes: int
) -> Generator[tuple[PendingTensor, str]]:
    declared = by_alignment({each.name: (each.shape, each.dtype) for each in tensors})
    with SafetensorsWriter(staging.folder / file, header_text(declared)) as writer:
        pending: dict[str, str] = {}
        size = 0
        try:
            for tensor in tensors:
                key = f"{file}:{tensor.name}"
                if key in staging.done and not writer.is_new:
                    yield tensor, staging.done[key]
                    continue
                value = tensor.read()
                writer.write(tensor.name, value)
                pending[key] = checksum(value)
                size += value.nbytes
                del value
                if size >= sync_bytes:
                    writer.sync()
                    staging.mark(pending)
                    pending, size = {}, 0
                yield tensor, pending.get(key) or staging.done[key]
        finally:  # also where it is stopped: what is done stays done
            writer.sync()
            staging.mark(pending)


def _require_room(staging: Staging, total: int) -> None:
    """Refuse what the disk has no room for, before the work."""
    there = sum(path.stat().st_blocks * 512 for path in staging.folder.glob("*.safetensors"))
    free = shutil.disk_usage(staging.folder).free
    if total - there > free:
        raise CheckpointError(
            f"{staging.target}: needs {total - there} bytes more, {free} are free there",
            hint="make room, or choose a directory on another disk",
        )
