"""What a converted checkpoint keeps of the one that it was made from: headers and digests.

With them the plan of loading can be made anew, without the source, and the source's files can be
written again byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import Checkpoint, TensorInfo
from llmfw.weights.safetensors_header import infos_of, read_header_text
from llmfw.weights.safetensors_reader import INDEX_NAME, SafetensorsCheckpoint

NAME = "source.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class SourceFile:
    """One file of weights.

    Args:
        name: Its path inside of the source's directory.
        size: Its bytes.
        sha256: Its digest.
        header: The JSON of its header as it stands in the file; "" where tensors are described.
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
        tensors: Where tensors are dequantised when they are read: each one as a mapping with the
            fields of `TensorInfo` and its name.
    """

    format: str
    files: tuple[SourceFile, ...]
    index: str | None = None
    tensors: tuple[dict[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of what `sha256sum` prints of the files."""
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    def headers(self) -> HeaderCheckpoint:
        """The source as a checkpoint whose values are gone."""
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            if file.header:
                infos |= infos_of(Path(file.name), file.header.encode(), file.size)
        for entry in self.tensors:
            fields = {key: entry[key] for key in ("file", "nbytes", "stored", "offset")}
            dtype = getattr(torch, entry["dtype"])
            infos[entry["name"]] = TensorInfo(tuple(entry["shape"]), dtype, **fields)
        return HeaderCheckpoint(self.format, infos)

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
    stored = getattr(checkpoint, "stored", checkpoint)
    return list(stored.files) if isinstance(stored, SafetensorsCheckpoint) else [stored.path]


def record_source(checkpoint: Checkpoint) -> SourceRecord:
    """Reads headers again and all files once through, for their digests.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    plain = isinstance(checkpoint, SafetensorsCheckpoint)
    files = []
    for file in files_of(checkpoint):
        header = read_header_text(file)[0].decode() if plain else ""
        name = file.relative_to(root).as_posix()
        files.append(SourceFile(name, file.stat().st_size, digest_of(file), header))
    index = root / INDEX_NAME
    text = index.read_text(encoding="utf-8") if plain and index.is_file() else None
    tensors = () if plain else tuple(_described(checkpoint))
    return SourceRecord(checkpoint.format, tuple(files), text, tensors)


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
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as exc:
        raise CheckpointError(
            f"{file}: cannot be read: {exc.strerror or exc}", file=str(file)
        ) from exc
    return digest.hexdigest()


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
        return SourceRecord(raw["format"], files, raw.get("index"), tuple(raw.get("tensors", ())))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{path}: is no record of a source ({type(exc).__name__}: {exc})",
            hint="convert the model again",
            file=str(path),
        ) from exc
