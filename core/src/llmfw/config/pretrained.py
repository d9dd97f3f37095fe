"""A checkpoint's configuration with transformers' defaults and names, mostly without transformers.

Importing one configuration class of transformers takes seconds. So its values are taken once for
each config.json, kept in the cache, and read from there by every later start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmfw.cache import cache_dir, find
from llmfw.errors import ConfigError

logger = logging.getLogger("llmfw.config")

FORMAT = 2  # of the cached file
_ALIASES = {"rope_scaling": "rope_parameters", "torch_dtype": "dtype"}


class PretrainedConfig:
    """The values of a transformers configuration, as attributes.

    Args:
        values: Every field with transformers' defaults filled in; those of `parts` are mappings.
        aliases: Other names of fields (transformers' attribute_map).
        parts: Aliases, parts and computed fields of those that are configurations themselves, such
            as text_config.
        computed: Fields that follow from others, which config.json must not have.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        parts: Mapping[str, Any] | None = None,
        computed: Sequence[str] = (),
    ) -> None:
        fields = dict(values)
        for name, names in (parts or {}).items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = PretrainedConfig(fields[name], *names)
        self.__dict__["_fields"] = fields
        self.__dict__["_computed"] = frozenset(computed)
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
            if name not in self._computed
        }


def pretrained_config_from(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that transformers makes of a raw config.json.

    Old fields (rope_theta, rope_scaling, torch_dtype) are upgraded by transformers.

    Raises:
        ConfigError: If transformers does not know the model_type, or refuses the values.
    """
    name = _cache_name(raw)
    try:
        kept = json.loads((find(name) or cache_dir() / name).read_text(encoding="utf-8"))
        return PretrainedConfig(kept["values"], *kept["names"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or not whole
    config = _transformers_config(raw)
    text = json.dumps({"values": _values_of(config), "names": _names_of(config)}, default=str)
    _keep(cache_dir() / name, text)
    find(name)  # counts as used
    made = json.loads(text)  # the same types as a later start will see
    return PretrainedConfig(made["values"], *made["names"])


def _cache_name(raw: Mapping[str, Any]) -> str:
    facts = [FORMAT, version("transformers"), raw]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"configs/{digest[:32]}.json"


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
        raise ConfigError(
            f"config.json is not a valid {model_type} configuration: {exc}",
            hint="mend the field, or get the model's config.json again",
        ) from exc


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


def _names_of(config: Any) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Aliases, those of parts, and the names of properties that cannot be set."""
    parts = {
        name: _names_of(part)
        for name in config.sub_configs
        if (part := getattr(config, name, None)) is not None
    }
    kind = type(config)
    properties = {name: getattr(kind, name) for name in dir(kind)}
    computed = [
        name for name, found in properties.items() if isinstance(found, property) and not found.fset
    ]
    return dict(config.attribute_map), parts, computed
