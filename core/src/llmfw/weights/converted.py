"""Converted checkpoints: tensors under the modules' own names, one file a rank.

    config.json              what it is: `converted_config`
    rank0.safetensors ...    the parameters of each rank, fused and cut, in the modules' layouts
    packed.safetensors       packed tensors (MXFP4, float8) as the source has them, for all ranks
    checksums.json           a checksum for each tensor
    hf/                      the source's own files: config.json, tokenizer, templates
    ignored.safetensors      tensors that the model does not take; they come back by an export
    source.json              the source's headers and digests

docs/checkpoint-format.md specifies it.
"""

from __future__ import annotations

from pathlib import Path

from llmfw.config.reading import read_json
from llmfw.errors import CheckpointError, ConfigError
from llmfw.weights.checked_reader import CheckedCheckpoint
from llmfw.weights.converted_config import read_converted_config
from llmfw.weights.dequantising import Dequantising, dequantising
from llmfw.weights.packed import PACKED
from llmfw.weights.source_record import NAME as SOURCE
from llmfw.weights.source_record import read_source

CHECKSUMS = "checksums.json"
IGNORED = "ignored.safetensors"


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank{rank}.safetensors"


class ConvertedCheckpoint(CheckedCheckpoint):
    """One rank's tensors, under the names of the parameters that they fill.

    Args:
        path: The converted checkpoint's directory.
        rank: Whose file.

    What stays packed is no tensor of it, but read through `packed`, under the source's names.

    Raises:
        ConfigError: If config.json cannot be read.
        CheckpointError: If a file is missing or damaged.
    """

    format = "llmfw"

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.config = read_converted_config(path)
        if not 0 <= rank < self.config.world_size:
            raise CheckpointError(
                f"{path}: has no rank {rank}, it was converted for {self.config.world_size}",
                hint="convert the model again for this many ranks",
            )
        self.rank = rank
        file = path / rank_file(rank)
        super().__init__(file, read_checksums(path).get(file.name, {}))
        self.path = path
        self.packed = self._open_packed()

    def _open_packed(self) -> Dequantising | None:
        """The reader of packed tensors, where there are some; it has the source's names."""
        format = self.config.packed
        if format is None:
            return None
        source = read_source(self.path)
        if source is None or source.format != format:
            raise CheckpointError(
                f"{self.path}: keeps {format} tensors packed, and no source.json that fits them",
                hint="convert the model again, or copy the whole directory",
                file=str(self.path / SOURCE),
            )
        checksums = read_checksums(self.path).get(PACKED, {})
        stored = CheckedCheckpoint(
            self.path / PACKED, checksums, in_parts=self.config.world_size > 1
        )
        return dequantising(format, stored, source.block_size)


def read_checksums(folder: Path) -> dict[str, dict[str, str]]:
    """Checksums by file and tensor; none where the writer kept none.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except ConfigError as exc:
        raise CheckpointError(exc.message, hint="convert the model again") from exc
    if not all(isinstance(tensors, dict) for tensors in found.values()):
        raise CheckpointError(f"{path}: is no table of checksums", hint="convert the model again")
    return found
