"""From what a user calls a model to the files it is made of."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llmfw.errors import ConfigError, LlmfwError, PluginLoadError, UsageError, reading_cure
from llmfw.weights.converted_config import HF_FOLDER, is_converted

logger = logging.getLogger("llmfw.weights")

ALIAS_GROUP = "llmfw.aliases"
ENGINE_MANIFEST = "manifest.json"
ENGINE_CHECKPOINT = "checkpoint"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
_HUB_COPIES = ("consolidated*", "original/*", "onnx/*")  # the same weights once more


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Args:
        name: What the user called it.
        model_dir: The directory with config.json and the tokenizer.
        checkpoint_path: What `open_checkpoint` opens for the weights: that directory, or a GGUF
            file.
        kind: "directory", "gguf", "hub", "alias", "checkpoint" (converted) or "engine".
        gguf: The GGUF file that the directory was unpacked from, where there is one.
        engine_dir: The engine directory that names the checkpoint, where there is one.
    """

    name: str
    model_dir: Path
    checkpoint_path: Path
    kind: Literal["directory", "gguf", "hub", "alias", "checkpoint", "engine"]
    gguf: Path | None = None
    engine_dir: Path | None = None


def resolve_model(model: str | Path) -> ModelSource:
    """Finds a model: a directory, a .gguf file, an alias that a plugin declares, or a hub id.

    In this order; what exists on disk comes first. A directory may be Hugging Face's, a converted
    checkpoint or an engine. A GGUF file is unpacked into the cache.

    Raises:
        ConfigError: If it is none of these, or the hub cannot be reached.
    """
    name = str(model)
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _directory(name, path)
    except PermissionError as exc:
        raise ConfigError(
            f"{exc.filename or path} cannot be read: {exc.strerror}", hint=reading_cure(exc, "")
        ) from exc
    if path.is_file() or path.suffix == ".gguf":
        return _file(name, path)
    aliases = _aliases()
    if name in aliases:
        return replace(_alias(name, aliases[name]), name=name, kind="alias")
    if _HUB_ID.fullmatch(name):
        return _hub(name)
    near = difflib.get_close_matches(name, aliases, n=1)
    known = f"; aliases: {', '.join(sorted(aliases))}" if aliases else ""
    raise ConfigError(
        f"model '{name}' is no directory, no .gguf file and no hub id (organisation/name){known}",
        hint=f"did you mean '{near[0]}'?" if near else "give the path of a model's directory",
    )


def require_original(source: ModelSource, reader: str) -> None:
    """Refuse a converted checkpoint where the original's names and files are needed.

    Args:
        source: From `resolve_model`.
        reader: What needs them, for the message.

    Raises:
        UsageError: If it is a converted checkpoint or an engine.
    """
    if source.kind in ("checkpoint", "engine"):
        raise UsageError(
            f"{source.name}: {reader} reads no converted checkpoint",
            hint="give what it was made from, or what it gives back: "
            f"llmfw export {source.name} OUT",
        )


def _directory(name: str, path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return _converted(name, path) if is_converted(path) else _hf(name, path)
    if (path / ENGINE_MANIFEST).is_file():
        checkpoint = path / ENGINE_CHECKPOINT
        return replace(_converted(name, checkpoint), kind="engine", engine_dir=path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _file(name, ggufs[0])
    what = f"{len(ggufs)} GGUF files" if ggufs else "no config.json"
    raise ConfigError(
        f"{path}: {what} there", hint="give a directory with config.json, or one .gguf file"
    )


def _hf(name: str, path: Path) -> ModelSource:
    return ModelSource(name, path, path, "directory")


def _converted(name: str, path: Path) -> ModelSource:
    if not is_converted(path):
        raise ConfigError(
            f"{path}: the converted checkpoint of this engine is not there",
            hint="was the checkpoint moved? Build the engine again: llmfw build CHECKPOINT ENGINE",
        )
    if not (path / HF_FOLDER / "config.json").is_file():
        raise ConfigError(
            f"{path}: {HF_FOLDER}/config.json is missing: what was converted is described there",
            hint="copy the whole directory again, or convert the model again",
        )
    return ModelSource(name, path / HF_FOLDER, path, "checkpoint")


def _file(name: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", hint="check the path")
    if path.suffix != ".gguf":
        raise ConfigError(f"{path}: not a model", hint="give its directory, or a .gguf file")
    from llmfw.weights.gguf_unpack import unpack_gguf

    unpacked = unpack_gguf(path)
    return ModelSource(name, unpacked.model_dir, unpacked.checkpoint_path, "gguf", gguf=path)


def _aliases() -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=ALIAS_GROUP):
        if entry.value not in [other.value for other in found.get(entry.name, [])]:
            found.setdefault(entry.name, []).append(entry)
    return found


def _alias(name: str, entries: list[importlib.metadata.EntryPoint]) -> ModelSource:
    owners = [entry.dist.name if entry.dist else entry.value for entry in entries]
    if len(entries) > 1:
        raise ConfigError(
            f"alias '{name}' is declared by several plugins: {', '.join(owners)}",
            hint="uninstall one of them, or give the model's path",
        )
    try:
        path = Path(entries[0].load()())
    except LlmfwError:
        raise
    except Exception as exc:
        raise PluginLoadError(
            f"alias '{name}' of {owners[0]} ({entries[0].value}) fails: "
            f"{type(exc).__name__}: {exc}",
            hint=f"reinstall {owners[0]}, or give the model's path",
        ) from exc
    return _directory(name, path) if path.is_dir() else _file(name, path)


def _hub(name: str) -> ModelSource:
    try:
        from huggingface_hub import snapshot_download

        path = Path(
            snapshot_download(
                name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_COPIES)
            )
        )
    except Exception as exc:
        raise ConfigError(
            f"model '{name}' is no directory here, and the hub does not give it: "
            f"{type(exc).__name__}: {_first_line(exc)}",
            hint="offline: download it elsewhere and give its directory\n"
            "private: log in with `hf auth login`",
        ) from exc
    return replace(_directory(name, path), kind="hub")


def _first_line(exc: Exception) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), "no message")
