"""manifest.json of an engine directory: what was built, from what, on what, and for what.

docs/engine-directory.md specifies it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmfw.config.reading import read_json
from llmfw.errors import ConfigError
from llmfw.models.machine import MachineFacts
from llmfw.weights.converted_config import PluginIdentity
from llmfw.weights.sources import ENGINE_MANIFEST

FORMAT = "llmfw-engine"
VERSION = 1
_AGAIN = "build the engine again: llmfw build CHECKPOINT ENGINE"


@dataclass(frozen=True)
class EngineDefaults:
    """Settings of a run of the engine unless it is told otherwise; None: settled at the start.

    Args:
        dtype: What the model runs in.
        max_model_len: Most tokens of a sequence.
        max_num_seqs: Most sequences in flight.
        max_num_batched_tokens: Most tokens of a step.
        kv_cache_memory: Of the cache, as `LLM` takes it.
    """

    dtype: str
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | float | str | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """How memory was shared out when the engine was built, in bytes.

    Args:
        weights: Of all parameters.
        kv_cache: Of K and V, and of other state.
        block_size: Tokens of a cache block.
        num_blocks: Blocks of the cache.
        max_model_len: Most tokens of a sequence.
        max_num_seqs: Most sequences in flight.
    """

    weights: int
    kv_cache: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True)
class GraphPlan:
    """The CUDA graphs that a start captures; none on a CPU.

    Args:
        batch_sizes: Padded batch sizes of decode steps.
        kv_limits: Longest sequences of decode steps, each with all batch sizes.
        prompt_lengths: Padded lengths of prompts.
    """

    batch_sizes: tuple[int, ...] = ()
    kv_limits: tuple[int, ...] = ()
    prompt_lengths: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many graphs that makes."""
        return len(self.batch_sizes) * len(self.kv_limits) + len(self.prompt_lengths)


@dataclass(frozen=True)
class EngineManifest:
    """The fields of manifest.json.

    Args:
        architecture: As in config.json.
        plugin: Who served the model.
        core_version: Of llmfw-core.
        machine: What it was built on.
        defaults: What a run takes unless told otherwise.
        memory: How memory was shared out.
        graphs: What is captured.
        kernels: What each op ran by: names of kernels.
        config_digest: SHA-256 of the model's own config.json.
        linked: Whether `checkpoint` is a link.
        files: SHA-256 of the directory's files, those of the checkpoint's weights left out, which
            have checksums of their own.
    """

    architecture: str
    plugin: PluginIdentity
    core_version: str
    machine: MachineFacts
    defaults: EngineDefaults
    memory: MemoryPlan
    graphs: GraphPlan
    kernels: Mapping[str, tuple[str, ...]]
    config_digest: str
    linked: bool
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json; its last field is the digest of the others."""
        fields = {"format": FORMAT, "format_version": VERSION, **asdict(self)}
        return json.dumps({**fields, "digest": _digest(fields)}, indent=2) + "\n"


def _digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as JSON, their names in order, without spaces."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_manifest(folder: Path) -> EngineManifest:
    """manifest.json of an engine directory.

    Raises:
        ConfigError: If it is no manifest, of a later format, or not as it was written.
    """
    path = folder / ENGINE_MANIFEST
    try:
        raw = read_json(path)
    except ConfigError as exc:
        raise ConfigError(exc.message, hint=_AGAIN) from exc
    if (raw.get("format"), raw.get("format_version")) != (FORMAT, VERSION):
        raise ConfigError(
            f"{path}: is {raw.get('format')!r} {raw.get('format_version')!r}, "
            f"not {FORMAT!r} {VERSION}",
            hint=_AGAIN,
        )
    digest = raw.pop("digest", None)
    if digest != _digest(raw):
        raise ConfigError(f"{path}: is not as it was written: its digest differs", hint=_AGAIN)
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigError(
            f"{path}: a field lacks or cannot be: {type(exc).__name__}: {exc}", hint=_AGAIN
        ) from exc


def _parse(raw: dict[str, Any]) -> EngineManifest:
    for name in raw["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file {name!r} lies outside of the directory")
    return EngineManifest(
        architecture=str(raw["architecture"]),
        plugin=PluginIdentity(**raw["plugin"]),
        core_version=str(raw["core_version"]),
        machine=MachineFacts(**raw["machine"]),
        defaults=EngineDefaults(**raw["defaults"]),
        memory=MemoryPlan(**raw["memory"]),
        graphs=GraphPlan(**{name: tuple(sizes) for name, sizes in raw["graphs"].items()}),
        kernels={op: tuple(names) for op, names in raw["kernels"].items()},
        config_digest=str(raw["config_digest"]),
        linked=bool(raw["linked"]),
        files={str(name): str(digest) for name, digest in raw["files"].items()},
    )
