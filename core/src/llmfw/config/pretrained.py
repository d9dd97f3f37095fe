"""A checkpoint's configuration with transformers' defaults and names, mostly without transformers.

Importing one configuration class of transformers takes seconds. So its values are taken once for
each config.json, kept in the cache, and read from there by every later start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmfw.cache import cache_dir
from llmfw.errors import ConfigError

logger = logging.getLogger("llmfw.config")

FORMAT = 1  # of the cached file
_ALIASES = {"rope_scaling": "rope_parameters", "torch_dtype": "dtype"}


class PretrainedConfig:
    """The values of a transformers configuration, as attributes.

    Args:
        values: Every field with transformers' defaults filled in; those of `parts` are mappings.
        aliases: Other names of fields (transformers' attribute_map).
        parts: Aliases of fields that are configurations themselves, such as text_config.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        fields = dict(values)
        for name, (their_aliases, their_parts) in (parts or {}).items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = PretrainedConfig(fields[name], their_aliases, their_parts)
        self.__dict__["_fields"] = fields
        self.__dict__["_aliases"] = {**_ALIASES, **(aliases or {})}

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        name_there = self.__dict__.get("_aliases", {}).get(name, name)
        for each in (name, name_there):
            if each in fields:
                return fields[each]
        raise AttributeError(f"the configuration has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[self._aliases.get(name, name)] = value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._fields, *self._aliases})

    def __repr__(self) -> str:
        return f"PretrainedConfig({self.to_dict()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def get_text_config(self, **_: Any) -> Any:
        """The text part of a configuration that wraps one, else the configuration itself."""
        return self._fields.get("text_config") or self

    def to_dict(self) -> dict[str, Any]:
        """All fields, as they would stand in config.json."""
        return {
            name: value.to_dict() if isinstance(value, PretrainedConfig) else value
            for name, value in self._fields.items()
        }


def pretrained_config_from(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that transformers makes of a raw config.json.

    Old fields (rope_theta, rope_scaling, torch_dtype) are upgraded by transformers.

    Raises:
        ConfigError: If transformers does not know the model_type, or refuses the values.
    """
    path = _cache_file(raw)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return PretrainedConfig(kept["values"], kept["aliases"], kept["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or not whole
    config = _transformers_config(raw)
    aliases, parts = _names_of(config)
    text = json.dumps(
        {"values": _values_of(config), "aliases": aliases, "parts": parts}, default=str
    )
    _keep(path, text)
    made = json.loads(text)  # the same types as a later start will see
    return PretrainedConfig(made["values"], made["aliases"], made["parts"])


def _cache_file(raw: Mapping[str, Any]) -> Path:
    facts = [FORMAT, version("transformers"), raw]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "configs" / f"{digest[:32]}.json"


def _keep(path: Path, text: str) -> None:
    """Write the file whole or not at all; without a writable cache the next start is slower."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as exc:
        logger.info("the configuration is not kept: %s", exc)


def _transformers_config(raw: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no configuration for model_type {model_type!r}",
            hint="the plugin can give its own: implement the llmfw_config hook",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except Exception as exc:
        raise ConfigError(f"config.json is not a valid {model_type} configuration: {exc}") from exc


def _values_of(config: Any) -> dict[str, Any]:
    """The fields, and the properties that the class computes from them."""
    from transformers import PreTrainedConfig

    values: dict[str, Any] = config.to_dict()
    values.setdefault("architectures", config.architectures)
    for name in set(dir(type(config))) - set(dir(PreTrainedConfig)):
        if isinstance(getattr(type(config), name), property) and name not in values:
            value = getattr(config, name, None)
            if isinstance(value, str | int | float | list | tuple):
                values[name] = value
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            values[name] = _values_of(part)
    return values


def _names_of(config: Any) -> tuple[dict[str, str], dict[str, Any]]:
    parts = {
        name: _names_of(part)
        for name in config.sub_configs
        if (part := getattr(config, name, None)) is not None
    }
    return dict(config.attribute_map), parts
