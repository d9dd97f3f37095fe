"""Unpacking: a GGUF file becomes an HF directory in the user's cache, once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmfw.errors import CheckpointError, reading_cure
from llmfw.weights.cache import cached_folder
from llmfw.weights.gguf_config import config_of, generation_config_of
from llmfw.weights.gguf_reader import GGUFCheckpoint
from llmfw.weights.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from llmfw.weights.safetensors_reader import SINGLE_NAME

logger = logging.getLogger("llmfw.weights")

# Written into the key: raise it when the unpacked files change.
_LAYOUT = 2
_UNPACK_BELOW = 1 << 30


@dataclass(frozen=True)
class UnpackedGGUF:
    """Where a GGUF's files are: the HF directory, and where its weights are read from."""

    model_dir: Path
    checkpoint_path: Path


def unpack_gguf(file: Path, *, unpack_below: int = _UNPACK_BELOW) -> UnpackedGGUF:
    """The HF directory of a GGUF file, made in the user's cache unless it is there already.

    It holds config, tokenizer, chat template and generation config; the weights too, as bfloat16
    safetensors, when they take fewer than `unpack_below` bytes so. Larger ones are read from the
    GGUF at each load. The entry is valid for the file's path, size and time of change.

    Raises:
        CheckpointError: If the file is missing or damaged.
        ConfigError: If its metadata cannot be read as a config, or the cache cannot be written.
        TokenizerError: If its tokenizer is of a kind not known here.
    """
    try:
        file = file.resolve(strict=True)
        stat = file.stat()
    except OSError as exc:
        raise CheckpointError(
            f"{file}: cannot be read: {exc.strerror or exc}",
            hint=reading_cure(exc, "check the path"),
            file=str(file),
        ) from exc
    origin = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    version = f"{_LAYOUT}:{stat.st_size}:{stat.st_mtime_ns}:{unpack_below}"
    stem = re.sub(r"[^\w.-]", "_", file.stem)[:80]
    model_dir = cached_folder(
        "gguf",
        f"{stem}-{origin}",
        hashlib.sha256(version.encode()).hexdigest()[:12],
        lambda folder: _fill(file, folder, unpack_below),
    )
    has_weights = (model_dir / SINGLE_NAME).exists()
    return UnpackedGGUF(model_dir, model_dir if has_weights else file)


def _fill(file: Path, folder: Path, unpack_below: int) -> None:
    logger.info("unpacking %s into the cache", file)
    checkpoint = GGUFCheckpoint(file)
    metadata = checkpoint.header.metadata
    config = config_of(checkpoint)
    tokenizer_of(file, metadata).save(str(folder / "tokenizer.json"))
    max_length = config.get("max_position_embeddings", 2048)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config_of(config, metadata))
    _write_json(folder / "tokenizer_config.json", tokenizer_config_of(metadata, max_length))
    numel = sum(torch.Size(checkpoint.info(name).shape).numel() for name in checkpoint.names())
    if numel * 2 < unpack_below:
        tensors = {
            name: checkpoint.tensor(name).to(
                torch.float32 if checkpoint.stays_float32(name) else torch.bfloat16
            )
            for name in checkpoint.names()
        }
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
