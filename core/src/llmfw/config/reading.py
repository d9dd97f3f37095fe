"""Reading a checkpoint's config.json without running any of its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmfw.errors import ConfigError, reading_cure

_DAMAGED = "it is damaged: mend it, or get it again"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: If it cannot be read, is not UTF-8 JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_plain_float)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist") from exc
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint=reading_cure(exc, "check the path"),
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc}", hint=_DAMAGED) from exc
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{path} is not JSON: {exc}", hint=_DAMAGED) from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _plain_float(value: dict[str, Any]) -> Any:
    """What transformers writes for numbers that JSON lacks, as the number."""
    tag = value.get("__float__")
    return float(tag) if len(value) == 1 and tag in ("Infinity", "-Infinity", "NaN") else value


def read_config_json(model_dir: Path) -> dict[str, Any]:
    """The contents of a model directory's config.json.

    Raises:
        ConfigError: If the directory holds none, or it cannot be read.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{model_dir} holds no config.json",
            hint="--model takes a directory with config.json and *.safetensors, or a GGUF file",
        )
    return read_json(path)


def architecture_of(raw: dict[str, Any], where: str = "config.json") -> str:
    """The architecture that a raw configuration names first.

    Raises:
        ConfigError: If it names none.
    """
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(
            f"{where} names no architecture",
            hint='add "architectures": ["NameForCausalLM"]: it is how the plugin is found',
        )
    return names[0]


def text_config(config: Any) -> Any:
    """The text part of a configuration that wraps one (multimodal models), else the whole."""
    return getattr(config, "text_config", None) or config
