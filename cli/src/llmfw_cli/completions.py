"""Shell completion of names from metadata alone: aliases, distributions, extensions."""

from __future__ import annotations


def complete_model(incomplete: str) -> list[str]:
    """Aliases that begin so; paths are completed by the shell."""
    from llmfw.plugins import Catalog

    return [name for name in Catalog.scan().aliases if name.startswith(incomplete)]


def complete_distribution(incomplete: str) -> list[str]:
    """Distributions with a plugin that begin so."""
    from llmfw.plugins import Catalog

    return [name for name in Catalog.scan().distributions if name.startswith(incomplete)]


def complete_extension(incomplete: str) -> list[str]:
    """Extensions that begin so."""
    from llmfw.plugins import Catalog

    return [name for name in Catalog.scan().extensions if name.startswith(incomplete)]
