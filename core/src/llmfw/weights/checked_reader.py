"""A safetensors file whose tensors are held against their checksums when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checksums import WORD, checksum_text, word_sum
from llmfw.weights.safetensors_reader import SafetensorsCheckpoint


class CheckedCheckpoint(SafetensorsCheckpoint):
    """Tensors of one file with checksums.

    A tensor that is read whole, at once or row after row, is compared on the way. Of one that is
    read otherwise all is compared before the first part is given.

    Args:
        file: The file.
        checksums: By tensor; one that has none is not compared.
        in_parts: Whether parts are read that nobody completes: each tensor is compared before.

    Raises:
        CheckpointError: If the file is missing or damaged; from reading, if a checksum differs.
    """

    def __init__(self, file: Path, checksums: Mapping[str, str], in_parts: bool = False) -> None:
        if not file.is_file():
            raise CheckpointError(
                f"{file}: is missing",
                hint="copy the whole directory again, or convert the model again",
                file=str(file),
            )
        super().__init__(file, [file])
        self._file = file
        self._checksums = checksums
        self._in_parts = in_parts
        self._begun: dict[str, tuple[int, int]] = {}  # bytes read from the start on, sum of them
        self._compared: set[str] = set()

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, mapped from the file."""
        value = super().tensor(name)
        self._follow(name, 0, value)
        return value

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of a tensor."""
        part = super().slice(name, dim, start, stop)
        info = self.info(name)
        # Rows are in one piece in the file; other parts are scattered over it.
        begin = start * (info.nbytes // info.shape[0]) if dim == 0 and info.shape[0] else None
        self._follow(name, begin, part)
        return part

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Rows `start` and on of a tensor, from the file into `out`."""
        super().read_into(name, out, start)
        info = self.info(name)
        self._follow(name, start * (info.nbytes // info.shape[0]) if start else 0, out)

    def _follow(self, name: str, begin: int | None, part: torch.Tensor) -> None:
        """Take note of a part that was read; `begin`: where it lies in the tensor, in bytes."""
        if name not in self._checksums or name in self._compared:
            return
        size = self.info(name).nbytes
        read, total = self._begun.get(name, (0, 0)) if begin else (0, 0)
        is_next = begin == read and not (self._in_parts and part.nbytes < size)
        read += part.nbytes
        if not is_next or (read < size and read % WORD):
            self._compare(name, word_sum(super().tensor(name)))
        elif read < size:
            self._begun[name] = (read, total + word_sum(part))
        else:
            self._begun.pop(name, None)
            self._compare(name, total + word_sum(part))

    def _compare(self, name: str, total: int) -> None:
        if checksum_text(total) != self._checksums[name]:
            raise CheckpointError(
                f"{self._file}: tensor '{name}' is not what was written: its checksum differs",
                hint="the file is damaged: convert the model again, or copy it again",
                file=str(self._file),
                tensor=name,
            )
        self._compared.add(name)
