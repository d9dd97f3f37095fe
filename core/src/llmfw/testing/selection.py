"""From a name on the command line to what is checked: installed plugins, files, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.utils import canonicalize_name

from llmfw.errors import ConfigError, UsageError
from llmfw.plugins import Catalog, PluginEntry, find_local
from llmfw.plugins.switches import nearest_hint
from llmfw.testing.reference import ReferenceFactory
from llmfw.testing.subject import Subject
from llmfw.testing.tiny import shrink


def model_entries(name: str, catalog: Catalog | None = None) -> tuple[PluginEntry, ...]:
    """The model entry points of a distribution, or those that serve an architecture.

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
    if name in catalog.models:
        return catalog.models[name]
    owned = catalog.distributions.get(canonicalize_name(name), ())
    return tuple(entry for entry in owned if entry.group == "llmfw.models")


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
    entries = _entries(name, Catalog.scan())
    if entries:
        owners = {entry.name: entry.dist for entry in entries}
        by_name = canonicalize_name(name) == canonicalize_name(entries[0].dist)
        return [
            Subject(each, distribution=owner if by_name else distribution, **common)
            for each, owner in owners.items()
        ]
    return [_of_model(name, distribution, common)]


def _of_model(name: str, distribution: str | None, common: dict[str, Any]) -> Subject:
    from llmfw.config import architecture_of, read_config_json
    from llmfw.weights import resolve_model

    try:
        raw = read_config_json(resolve_model(name).model_dir)
    except ConfigError as exc:
        known = Catalog.scan().models
        raise UsageError(
            f"{name!r} is no architecture or plugin that is installed, and no model: {exc.message}",
            hint=nearest_hint(name, known, "architectures"),
        ) from exc
    return Subject(architecture_of(raw), shrink(raw), distribution=distribution, **common)
