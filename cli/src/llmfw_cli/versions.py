"""Versions of what takes part in an answer, from metadata: nothing is imported to find them."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "llmfw-core",
    "llmfw-cli",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pluggy",
)


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        version = version_of(package)
        if version is not None:
            found[package] = version
    return found
