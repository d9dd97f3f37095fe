"""Safetensors checkpoints: one file, or shards with an index. Headers first, values by slices."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.safetensors_header import read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# A mapped file's pages count as our memory until it is unmapped: map it anew after so many bytes.
_REMAP_BYTES = 16 << 20


class SafetensorsCheckpoint:
    """Tensors of one or several safetensors files.

    Args:
        path: The directory or file it was opened from.
        files: The files; no tensor may be in two of them.
        index: Tensor name to file name, where an index says so; it must agree with the files.

    Raises:
        CheckpointError: See `safetensors_header.read_header`; also for a tensor in two files, and
            for an index that names a missing file or tensor.
    """

    format = "safetensors"

    def __init__(
        self, path: Path, files: Sequence[Path], index: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._local = threading.local()
        for file in files:
            for name, info in read_header(file).items():
                if name in self._files:
                    raise CheckpointError(
                        f"tensor '{name}' is in two files: {self._files[name]} and {file}",
                        hint="remove the file that does not belong to this checkpoint",
                        tensor=name,
                        file=str(file),
                    )
                self._infos[name], self._files[name] = info, file
        if index is not None:
            _check_index(path, index, self._files)

    def names(self) -> Sequence[str]:
        """All names, file by file in the order of their data."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """The header of one tensor."""
        if name not in self._infos:
            raise CheckpointError(f"no tensor '{name}' in {self.path}", tensor=name)
        return self._infos[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, mapped from the file."""
        return self._read(name, self.info(name).nbytes, lambda handle: handle.get_tensor(name))

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of a tensor; only that part is read."""
        info = self.info(name)
        index = (*(slice(None) for _ in range(dim)), slice(start, stop))
        nbytes = info.nbytes * (stop - start) // max(info.shape[dim], 1)
        return self._read(name, nbytes, lambda handle: handle.get_slice(name)[index])

    def reads_into(self, name: str, out: torch.Tensor) -> bool:
        """Whether the bytes of the file are those of `out`: on the CPU, no gaps, the same dtype."""
        stored = self.info(name).dtype
        return out.device.type == "cpu" and out.dtype == stored and out.is_contiguous()

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Rows `start` and on of a tensor, from the file into `out` without a copy in between."""
        info, file = self.info(name), self._files[name]
        row = info.nbytes // info.shape[0] if info.shape else 0
        flat = torch.as_strided(out.detach(), (out.numel(),), (1,))
        left = flat.view(torch.uint8).numpy().data
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(info.offset + start * row)
                while left:
                    count = stream.readinto(left)
                    if not count:
                        raise OSError("the file has become shorter")
                    left = left[count:]
        except OSError as exc:
            raise _unreadable(file, name, exc) from exc

    def _read(self, name: str, nbytes: int, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        file = self._files[name]
        try:
            return read(self._handle(file, nbytes))
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise _unreadable(file, name, exc) from exc

    def _handle(self, file: Path, nbytes: int) -> Any:
        """This thread's one open file, opened anew now and then: see `_REMAP_BYTES`."""
        local = self._local
        if getattr(local, "file", None) != file or local.nbytes >= _REMAP_BYTES:
            local.handle = None
            local.handle = safe_open(file, framework="pt", device="cpu")
            local.file, local.nbytes = file, 0
        local.nbytes += nbytes
        return local.handle


def _unreadable(file: Path, name: str, exc: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor '{name}': cannot be read: {exc}",
        hint="the file is damaged or was changed while it was read: download it again",
        file=str(file),
        tensor=name,
    )


def open_safetensors(path: Path) -> SafetensorsCheckpoint:
    """Opens a file, or a directory with `model.safetensors`, an index, or numbered shards.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    if path.is_file():
        return SafetensorsCheckpoint(path, [path])
    if (path / SINGLE_NAME).exists():
        return SafetensorsCheckpoint(path, [path / SINGLE_NAME])
    if (path / INDEX_NAME).exists():
        index = _read_index(path / INDEX_NAME)
        files = [path / name for name in dict.fromkeys(index.values())]
        return SafetensorsCheckpoint(path, files, index)
    return SafetensorsCheckpoint(path, _unindexed(path))


def _unindexed(path: Path) -> list[Path]:
    """A directory's files without an index: the only one, or a complete set of numbered shards."""
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        return files
    shards = [found for file in files if (found := _SHARD.fullmatch(file.name))]
    if not files or len(shards) < len(files):
        raise CheckpointError(
            f"{path}: {len(files)} safetensors files, none of them {SINGLE_NAME} or {INDEX_NAME}",
            hint="name the file itself, or add the index",
        )
    stem, _, count = shards[0].groups()
    wanted = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    missing = [name for name in wanted if not (path / name).exists()]
    if missing or len(files) != len(wanted):
        raise CheckpointError(
            f"{path}: shards missing: {', '.join(missing) or 'the numbering is mixed'}",
            hint="download the missing files",
        )
    return [path / name for name in wanted]


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name; every file lies in the index's directory and exists."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{file}: no index of safetensors ({type(exc).__name__}: {exc})",
            hint="download it again",
            file=str(file),
        ) from exc
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{file}: its weight_map is no table of names", file=str(file))
    tensor_of = {name: tensor for tensor, name in reversed(index.items())}
    for name, tensor in reversed(tensor_of.items()):
        _check_inside(file, name, tensor)
    missing = {name: t for name, t in tensor_of.items() if not (file.parent / name).is_file()}
    if missing:
        listed = "\n".join(
            f"  {name} (tensor '{missing[name]}'{_and_more(index, name)})"
            for name in sorted(missing)
        )
        raise CheckpointError(
            f"{file}: files named there are missing:\n{listed}",
            hint="download the missing files",
            file=sorted(missing)[0],
        )
    return index


def _and_more(index: Mapping[str, str], name: str) -> str:
    count = sum(file == name for file in index.values()) - 1
    return f" and {count} more" if count else ""


def _check_inside(file: Path, name: str, tensor: str) -> None:
    """By its text, not resolved: a hub cache links each file to another directory."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts:
        raise CheckpointError(
            f"{file}: tensor '{tensor}': file {name!r} lies outside the checkpoint's directory",
            hint="do not use this checkpoint: its index reaches for files elsewhere",
            file=name,
            tensor=tensor,
        )


def _check_index(path: Path, index: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for tensor, name in index.items():
        if tensor not in files:
            raise CheckpointError(
                f"{path / name}: tensor '{tensor}' is in the index but not in the file",
                hint="the files and the index belong to different downloads: download them again",
                file=name,
                tensor=tensor,
            )
        if files[tensor] != path / name:
            raise CheckpointError(
                f"tensor '{tensor}': the index says {name}, it is in {files[tensor].name}",
                hint="the files and the index belong to different downloads: download them again",
                file=name,
                tensor=tensor,
            )
    unlisted = [tensor for tensor in files if tensor not in index]
    if unlisted:
        raise CheckpointError(
            f"{files[unlisted[0]]}: tensor '{unlisted[0]}' is not in the index",
            hint="the files and the index belong to different downloads: download them again",
            file=str(files[unlisted[0]]),
            tensor=unlisted[0],
        )
