"""The contract of what `pytest --llmfw-plugin NAME` names: one class an architecture."""

from __future__ import annotations

from packaging.utils import canonicalize_name

from llmfw.errors import UsageError
from llmfw.plugins import Catalog, PluginEntry
from llmfw.plugins.switches import nearest_hint
from llmfw.testing import plugin
from llmfw.testing.contract import ModelContract


def model_entries(name: str, catalog: Catalog | None = None) -> tuple[PluginEntry, ...]:
    """The model entry points of a distribution, or those that serve an architecture.

    Raises:
        UsageError: If neither is installed.
    """
    catalog = catalog or Catalog.scan()
    if name in catalog.models:
        return catalog.models[name]
    found = catalog.distributions.get(canonicalize_name(name), ())
    models = tuple(entry for entry in found if entry.group == "llmfw.models")
    if models:
        return models
    known = [*catalog.models, *catalog.distributions]
    raise UsageError(
        f"no installed plugin is called {name!r} or serves an architecture of that name",
        hint=nearest_hint(name, known, "installed"),
    )


def contract_of(entry: PluginEntry) -> type[ModelContract]:
    """A test class for one entry point."""
    facts = {"architecture": entry.name, "distribution": entry.dist, "__module__": __name__}
    return type(f"Test{entry.name}", (ModelContract,), facts)


for _name in plugin.wanted:
    for _entry in model_entries(_name):
        globals()[f"Test{_entry.name}"] = contract_of(_entry)
