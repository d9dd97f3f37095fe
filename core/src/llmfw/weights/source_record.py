"""What a converted checkpoint keeps of the one that it was made from: headers and digests.

With them the plan of loading can be made anew, without the source, and the source's files can be
written again byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmfw.errors import CheckpointError, reading_cure
from llmfw.weights.block_scales import BlockScaledCheckpoint
from llmfw.weights.checkpoint import Checkpoint, TensorInfo
from llmfw.weights.dequantising import Dequantising, dequantising
from llmfw.weights.safetensors_header import infos_of, read_header_text
from llmfw.weights.safetensors_reader import INDEX_NAME, SafetensorsCheckpoint

NAME = "source.json"
_READERS = 4  # of files at once: a digest takes longer than reading does


@dataclass(frozen=True)
class SourceFile:
    """One file of weights.

    Args:
        name: Its path inside of the source's directory.
        size: Its bytes.
        sha256: Its digest.
        header: The JSON of its header as it stands in the file; "" where it is no safetensors file.
    """

    name: str
    size: int
    sha256: str
    header: str = ""


@dataclass(frozen=True)
class SourceRecord:
    """The source's headers.

    Args:
        format: Of the checkpoint: "safetensors", "gguf", "float8" or "mxfp4".
        files: Its files of weights, in the order in which they were read.
        index: The text of model.safetensors.index.json; None where there was none.
        tensors: Of files without such a header: each tensor as it is read, a mapping with the
            fields of `TensorInfo` and its name.
        block_size: Of "float8": rows and columns that share a scale.
    """

    format: str
    files: tuple[SourceFile, ...]
    index: str | None = None
    tensors: tuple[dict[str, Any], ...] = ()
    block_size: tuple[int, int] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of what `sha256sum` prints of the files."""
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    def headers(self) -> Checkpoint:
        """The source as a checkpoint whose values are gone."""
        if self.format == SafetensorsCheckpoint.format:
            return self.stored_headers()
        if not self.tensors:
            return dequantising(self.format, self.stored_headers(), self.block_size)
        infos: dict[str, TensorInfo] = {}
        for entry in self.tensors:
            fields = {key: entry[key] for key in ("file", "nbytes", "stored", "offset")}
            dtype = getattr(torch, entry["dtype"])
            infos[entry["name"]] = TensorInfo(tuple(entry["shape"]), dtype, **fields)
        return HeaderCheckpoint(self.format, infos)

    def stored_headers(self) -> HeaderCheckpoint:
        """The same, its tensors as they are stored; none where files have no such header."""
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            if file.header:
                infos |= infos_of(Path(file.name), file.header.encode(), file.size)
        return HeaderCheckpoint(SafetensorsCheckpoint.format, infos)

    def to_json(self) -> str:
        """The text of source.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


class HeaderCheckpoint:
    """Headers without values: enough for planning.

    Args:
        format: Of the checkpoint that the headers are from.
        infos: The tensors, in its order.
    """

    def __init__(self, format: str, infos: dict[str, TensorInfo]) -> None:
        self.format = format
        self.path = Path("<headers>")
        self._infos = infos

    def names(self) -> Sequence[str]:
        """All names."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """The header of one tensor."""
        if name not in self._infos:
            raise CheckpointError(f"no tensor '{name}' among these headers", tensor=name)
        return self._infos[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Refused: there are headers only."""
        raise CheckpointError(f"tensor '{name}': only its header was kept", tensor=name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Refused: there are headers only."""
        return self.tensor(name)


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files of weights that a checkpoint is read from."""
    stored = stored_of(checkpoint)
    return list(stored.files) if isinstance(stored, SafetensorsCheckpoint) else [stored.path]


def stored_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is stored, where it is dequantised when it is read; else itself."""
    return checkpoint.stored if isinstance(checkpoint, Dequantising) else checkpoint


def record_source(checkpoint: Checkpoint) -> SourceRecord:
    """Reads headers again and all files once through, for their digests.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    plain = isinstance(stored_of(checkpoint), SafetensorsCheckpoint)
    paths = files_of(checkpoint)
    with ThreadPoolExecutor(min(len(paths), _READERS)) as pool:
        digests = list(pool.map(digest_of, paths))
    files = tuple(
        SourceFile(
            name=path.relative_to(root).as_posix(),
            size=path.stat().st_size,
            sha256=digest,
            header=read_header_text(path)[0].decode() if plain else "",
        )
        for path, digest in zip(paths, digests, strict=True)
    )
    index = root / INDEX_NAME
    return SourceRecord(
        checkpoint.format,
        files,
        index=index.read_text(encoding="utf-8") if plain and index.is_file() else None,
        tensors=() if plain else tuple(_described(checkpoint)),
        block_size=checkpoint.block if isinstance(checkpoint, BlockScaledCheckpoint) else None,
    )


def _described(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found = []
    for name in checkpoint.names():
        entry = asdict(checkpoint.info(name))
        entry |= {"name": name, "dtype": str(entry["dtype"]).removeprefix("torch.")}
        found.append(entry)
    return found


def digest_of(file: Path) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise CheckpointError(
            f"{file}: cannot be read: {exc.strerror or exc}",
            hint=reading_cure(exc, "check the disk, or get the file again"),
            file=str(file),
        ) from exc


def read_source(folder: Path) -> SourceRecord | None:
    """The record of a converted checkpoint; None where its writer kept none.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(SourceFile(**file) for file in raw["files"])
        tensors, block = tuple(raw.get("tensors", ())), raw.get("block_size")
        block_size = None if block is None else (int(block[0]), int(block[1]))
        return SourceRecord(raw["format"], files, raw.get("index"), tensors, block_size)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        raise CheckpointError(
            f"{path}: is no record of a source ({type(exc).__name__}: {exc})",
            hint="convert the model again",
            file=str(path),
        ) from exc
