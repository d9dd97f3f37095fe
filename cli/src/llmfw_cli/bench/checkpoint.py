"""A checkpoint of random weights for any config.json, written as a stream."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llmfw.errors import CheckpointError, ConfigError, UsageError

STD = 0.02
# Values are drawn once and repeat; a prime length keeps rows of any width from being alike.
POOL = 16_777_213
CHUNK = 1 << 22
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Written:
    """What was written: files, tensors and bytes of values."""

    files: int
    tensors: int
    nbytes: int


def config_file(config: Path) -> Path:
    """The config.json that a path means: the file itself, or that of a directory.

    Raises:
        UsageError: If there is none.
    """
    file = config / "config.json" if config.is_dir() else config
    if not file.is_file():
        raise UsageError(f"{file} is no file", hint="name a config.json or its directory")
    return file


def write_random_checkpoint(
    config: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Written:
    """Write config.json and random weights N(0, 0.02) under the names that transformers saves.

    Norms' weights are one, biases zero. Memory holds one piece of a tensor at a time.

    Args:
        config: A config.json or its directory, from which the tokenizer comes along.
        target: A directory that does not exist or has no weights.
        dtype: Of all weights: float32, bfloat16 or float16.
        shard_bytes: Above this, several files with an index are written.
        seed: Of the values.
        progress: Called with (bytes done, bytes in all, tensor).

    Raises:
        UsageError: If there is no such configuration.
        ConfigError: If transformers has no model for it.
        CheckpointError: If there are weights in the target already or it cannot be written.
    """
    source = config_file(config)
    if any(target.glob("*.safetensors*")):
        raise CheckpointError(
            f"{target}: there are weights already", hint="choose another directory"
        )
    shapes = tensor_shapes(source)
    shards = list(_shards(shapes, dtype, shard_bytes))
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    pool = torch.empty(POOL).normal_(0.0, STD, generator=torch.Generator().manual_seed(seed))
    values = _Values(pool.to(dtype))
    done = 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            name = "model.safetensors" if len(shards) == 1 else name
            with (target / name).open("wb") as stream:
                stream.write(_header(shard, dtype))
                for tensor, shape in shard.items():
                    done += values.write(stream, tensor, math.prod(shape))
                    if progress is not None:
                        progress(done, total, tensor)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            path = target / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        _write_config(source, target, dtype)
    except OSError as exc:
        raise CheckpointError(f"{target}: cannot be written: {exc}", file=str(target)) from exc
    return Written(len(shards), len(shapes), total)


def tensor_shapes(config: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of this config.json.

    They are those of transformers' model, built without memory and named as it would be saved.

    Raises:
        ConfigError: If transformers has no model for it, or the file cannot be read.
    """
    from llmfw.config.reading import read_json
    from llmfw.testing.reference import make_reference, transformers_config

    known = transformers_config(read_json(config))
    if known is None:
        raise ConfigError(
            f"transformers has no model for {config}, which would tell the tensors' names",
            hint="bench with --dummy-weights instead, which needs no checkpoint",
        )
    with torch.device("meta"):
        state = _published(make_reference(known, dtype=torch.bfloat16))
    return {name: tuple(value.shape) for name, value in state.items()}


def _published(model: Any) -> Mapping[str, torch.Tensor]:
    """The state dict as save_pretrained names it: experts numbered, tied tensors once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: value for name, value in state.items() if name not in tied}
    return revert_weight_conversion(model, state)  # type: ignore[no-any-return]


class _Values:
    """Gives random values piece by piece, each piece from another place of the pool."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._at = 0

    def write(self, stream: BinaryIO, name: str, count: int) -> int:
        """Write `count` values of tensor `name`; the bytes written."""
        constant = _constant(name)
        left = count
        while left:
            size = min(left, CHUNK, len(self._pool) - self._at)
            piece = self._pool[self._at : self._at + size]
            if constant is not None:
                piece = torch.full_like(piece, constant)
            stream.write(piece.view(torch.uint8).numpy().data)
            self._at = (self._at + size) % len(self._pool)
            left -= size
        return count * self._pool.itemsize


def _constant(name: str) -> float | None:
    """One for weights of norms, zero for biases; other tensors are random."""
    if name.endswith("bias"):
        return 0.0
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return 1.0 if "norm" in owner or owner.startswith("ln_") else None


def _shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def _header(shard: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """A file's length field and JSON, padded so that values start at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    raw = json.loads(source.read_text("utf-8"))
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    for name in _BESIDE:
        if (source.parent / name).is_file():
            shutil.copy2(source.parent / name, target / name)
