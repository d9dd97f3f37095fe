"""config.json of a converted checkpoint: what it holds, for whom, and what was lost on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping as MappingType
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmfw.config import QuantConfig
from llmfw.config.reading import read_json
from llmfw.errors import ConfigError

FORMAT = "llmfw-checkpoint"
VERSION = 1
HF_FOLDER = "hf"
_AGAIN = "convert the model again: llmfw convert MODEL OUT"


@dataclass(frozen=True)
class PluginIdentity:
    """Whose modules the tensors are named after; a local plugin has its file's digest as version.

    Args:
        distribution: The distribution, or the local plugin's file name.
        version: Its version, or "sha256:..." of the file.
    """

    distribution: str
    version: str

    @property
    def label(self) -> str:
        """Both, as logs and errors show them."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class SourceSummary:
    """What was converted.

    Args:
        name: The last part of what the user called it.
        kind: "directory", "gguf", "hub" or "alias".
        digest: Of its weights; see `SourceRecord.digest`.
    """

    name: str
    kind: str
    digest: str


@dataclass(frozen=True)
class LossyStep:
    """Something that no export gives back.

    Args:
        step: "dtype", "packed" (dequantised), "gguf" or "ignored".
        detail: What happened, for people.
    """

    step: str
    detail: str


@dataclass(frozen=True)
class ConvertedConfig:
    """The fields of config.json.

    Args:
        architecture: As in the source's config.json.
        dtype: What the model runs in unless told otherwise.
        tp_size: Tensor-parallel ranks, one file each.
        pp_size: Pipeline stages; 1 so far.
        plugin: Whose modules the tensors are named after.
        core_version: Of llmfw-core.
        source: What was converted.
        quantization: How weights are stored; the default so far.
        converted_dtype: The dtype that was asked for; None: each tensor has its own.
        packed: The format of the tensors that are kept as the source has them, "mxfp4" or "float8";
            None: there are none.
        layouts: Digest of each rank's plan of loading; () where the writer knew no plan.
        parameter_dtypes: Parameters that keep a dtype of their own whatever the rest runs in.
        ties: Parameters that are the same object as another.
        lossy: What no export gives back.
        left_behind: Files of the source that did not travel along.
    """

    architecture: str
    dtype: str
    plugin: PluginIdentity
    core_version: str
    source: SourceSummary
    tp_size: int = 1
    pp_size: int = 1
    quantization: QuantConfig = field(default_factory=QuantConfig)
    converted_dtype: str | None = None
    packed: str | None = None
    layouts: tuple[str, ...] = ()
    parameter_dtypes: MappingType[str, str] = field(default_factory=dict)
    ties: MappingType[str, str] = field(default_factory=dict)
    lossy: tuple[LossyStep, ...] = ()
    left_behind: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks, and files of weights."""
        return self.tp_size * self.pp_size

    def kept_dtypes(self) -> dict[str, torch.dtype]:
        """`parameter_dtypes` as torch dtypes."""
        return {name: getattr(torch, dtype) for name, dtype in self.parameter_dtypes.items()}

    def to_json(self) -> str:
        """The text of config.json."""
        fields = asdict(self)
        ranks = {"tp_size": fields.pop("tp_size"), "pp_size": fields.pop("pp_size")}
        mapping = {"world_size": self.world_size, **ranks}
        head = {"format": FORMAT, "format_version": VERSION, "mapping": mapping}
        return json.dumps({**head, **fields}, indent=2) + "\n"


def is_converted(folder: Path) -> bool:
    """Whether a directory's config.json says that it is a converted checkpoint."""
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except ConfigError:
        return False


def read_converted_config(folder: Path) -> ConvertedConfig:
    """config.json of a converted checkpoint.

    Raises:
        ConfigError: If it is of a later format, lacks a field or has one that cannot be, or names a
            quantisation, which is not served yet.
    """
    path = folder / "config.json"
    raw = read_json(path)
    version = raw.get("format_version")
    if version != VERSION:
        raise ConfigError(
            f"{path}: format_version {version!r} is not known here, {VERSION} is",
            hint=f"upgrade llmfw-core, or {_AGAIN}",
        )
    try:
        config = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigError(
            f"{path}: a field lacks or cannot be: {type(exc).__name__}: {exc}", hint=_AGAIN
        ) from exc
    if config.quantization.quant_algo is not None:
        raise ConfigError(
            f"{path}: its weights are quantised ({config.quantization.quant_algo}), "
            "which is not served yet",
            hint="convert the model without --quantize",
        )
    return config


def _parse(raw: dict[str, Any]) -> ConvertedConfig:
    mapping, quantization = raw["mapping"], raw.get("quantization") or {}
    excluded = tuple(quantization.get("exclude_modules", ()))
    config = ConvertedConfig(
        architecture=str(raw["architecture"]),
        dtype=str(raw["dtype"]),
        plugin=PluginIdentity(**raw["plugin"]),
        core_version=str(raw["core_version"]),
        source=SourceSummary(**raw["source"]),
        tp_size=int(mapping["tp_size"]),
        pp_size=int(mapping["pp_size"]),
        quantization=QuantConfig(**{**quantization, "exclude_modules": excluded}),
        converted_dtype=raw.get("converted_dtype"),
        packed=raw.get("packed"),
        layouts=tuple(raw.get("layouts", ())),
        parameter_dtypes=dict(raw.get("parameter_dtypes", {})),
        ties=dict(raw.get("ties", {})),
        lossy=tuple(LossyStep(**step) for step in raw.get("lossy", ())),
        left_behind=tuple(raw.get("left_behind", ())),
    )
    if config.tp_size < 1 or config.pp_size < 1 or mapping["world_size"] != config.world_size:
        raise ValueError(f"mapping {mapping}")
    if config.layouts and len(config.layouts) != config.world_size:
        raise ValueError(f"{len(config.layouts)} layouts for {config.world_size} ranks")
    if not isinstance(config.packed, str | None):
        raise TypeError(f"packed {config.packed!r}")
    config.kept_dtypes()
    return config
