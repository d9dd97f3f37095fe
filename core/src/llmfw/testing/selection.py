"""From a name on the command line to what is checked: installed plugins, files, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from packaging.utils import canonicalize_name

from llmfw.errors import ConfigError, UsageError
from llmfw.plugins import Catalog, PluginEntry, find_local
from llmfw.plugins.catalog import MODELS
from llmfw.plugins.choose import FALLBACK
from llmfw.plugins.resolve import load_checked
from llmfw.plugins.switches import nearest_hint
from llmfw.testing.reference import ReferenceFactory
from llmfw.testing.subject import Subject
from llmfw.testing.tiny import model_type_of, shrink


def model_entries(name: str, catalog: Catalog | None = None) -> tuple[PluginEntry, ...]:
    """The model entry points of a distribution, or those that serve an architecture.

    A fallback's is there once for each architecture that its `tiny_configs` names.

    Raises:
        UsageError: If neither is installed.
    """
    catalog = catalog or Catalog.scan()
    found = _entries(name, catalog)
    if not found:
        known = [*catalog.models, *{entry.dist for entry in catalog.entries}]
        raise UsageError(
            f"no installed plugin is called {name!r} or serves an architecture of that name",
            hint=nearest_hint(name, known, "installed"),
        )
    return found


def _entries(name: str, catalog: Catalog) -> tuple[PluginEntry, ...]:
    if catalog.owners(name):
        return catalog.owners(name)
    owned = catalog.distributions.get(canonicalize_name(name), ())
    models = [entry for entry in owned if entry.group == MODELS]
    return tuple(each for entry in models for each in _by_architecture(entry, catalog))


def _by_architecture(entry: PluginEntry, catalog: Catalog) -> Iterator[PluginEntry]:
    if not entry.is_fallback:
        yield entry
        return
    for architecture in getattr(load_checked(entry, catalog), "tiny_configs", ()):
        yield replace(entry, name=architecture)


def _falls_back(name: str, catalog: Catalog) -> bool:
    """Whether a name is an architecture of transformers that nothing but a fallback serves."""
    if FALLBACK not in catalog.models or not name.isidentifier():
        return False
    try:
        model_type_of(name)
    except ConfigError:
        return False
    return True


def subjects_of(
    name: str,
    *,
    reference: str | ReferenceFactory | None = None,
    distribution: str | None = None,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> list[Subject]:
    """The architectures that a name stands for, each with a tiny configuration.

    Args:
        name: A registered or installed architecture, an installed distribution (all that it
            serves), or a model, whose own configuration is then made small.
        reference, distribution, device, settings: As `Subject` takes them.

    Raises:
        UsageError: If it is none of these.
    """
    common: dict[str, Any] = {"reference": reference, "device": device, "settings": settings}
    if find_local(name) is not None:
        return [Subject(name, distribution=distribution, **common)]
    catalog = Catalog.scan()
    entries = _entries(name, catalog)
    if entries:
        owners = {entry.name: entry.dist for entry in entries}
        by_name = canonicalize_name(name) == canonicalize_name(entries[0].dist)
        return [
            Subject(each, distribution=owner if by_name else distribution, **common)
            for each, owner in owners.items()
        ]
    if _falls_back(name, catalog):
        return [Subject(name, distribution=distribution, **common)]
    return [_of_model(name, distribution, common)]


def _of_model(name: str, distribution: str | None, common: dict[str, Any]) -> Subject:
    from llmfw.config import architecture_of, read_config_json
    from llmfw.weights import resolve_model

    try:
        raw = read_config_json(resolve_model(name).model_dir)
    except ConfigError as exc:
        known = set(Catalog.scan().models) - {FALLBACK}
        raise UsageError(
            f"{name!r} is no architecture or plugin that is installed, and no model: {exc.message}",
            hint=nearest_hint(name, known, "architectures"),
        ) from exc
    return Subject(architecture_of(raw), shrink(raw), distribution=distribution, **common)
