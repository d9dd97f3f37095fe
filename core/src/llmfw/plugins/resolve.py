"""From an architecture to a loaded plugin: local ones first, then the one installed owner."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from llmfw.plugins.catalog import Catalog, PluginEntry
from llmfw.plugins.choose import find_named
from llmfw.plugins.compat import check_compatible
from llmfw.plugins.local import LocalPlugin, find_local, load_plugin_modules
from llmfw.plugins.switches import PluginSwitches

logger = logging.getLogger("llmfw.plugins")


@dataclass(frozen=True)
class ResolvedPlugin:
    """The plugin that serves a model, loaded.

    Args:
        architecture: What was asked for.
        plugin: The object or module with hook implementations.
        entry: Where it is installed; None for a local one.
        local: Where it was registered; None for an installed one.
        extensions: Label and object of each named extension.
        extension_entries: Where these are installed, in the same order.
    """

    architecture: str
    plugin: object
    entry: PluginEntry | None = None
    local: LocalPlugin | None = None
    extensions: tuple[tuple[str, object], ...] = ()
    extension_entries: tuple[PluginEntry, ...] = ()

    @property
    def label(self) -> str:
        """What errors and logs call it: distribution and version, or the local plugin's file."""
        owner = self.entry or self.local
        assert owner is not None
        return owner.label


def resolve_plugin(
    architecture: str,
    *,
    prefer: str | None = None,
    extensions: Sequence[str] = (),
    catalog: Catalog | None = None,
    fallback: bool = True,
) -> ResolvedPlugin:
    """Find and load the plugin of `architecture`, and the extensions asked for.

    Nothing else is imported, and an installed plugin only after its requirements have been checked.

    Args:
        architecture: As in `config.json`.
        prefer: The installed distribution that must serve it (`--plugin`); it also passes over
            local plugins.
        extensions: Names from the group `llmfw.extensions`.
        catalog: What is installed; scanned when left out.
        fallback: Whether a fallback may serve it where no plugin names it.

    Raises:
        UnknownArchitectureError: If nothing serves it.
        PluginConflictError: If several installed plugins do.
        PluginIncompatibleError: If its metadata rule out what is installed.
        PluginLoadError: If its code fails to import.
        UsageError: If a name is not installed or a variable of the environment cannot be.
    """
    load_plugin_modules()
    catalog = catalog or Catalog.scan()
    local = find_local(architecture) if prefer is None else None
    entry = catalog.find(architecture, prefer, fallback=fallback) if local is None else None
    named = tuple(_find_extension(catalog, name) for name in extensions)
    if local is not None:
        _tell_what_it_hides(local, catalog)
    return load_resolved(architecture, entry or local, named, catalog)


def load_resolved(
    architecture: str,
    owner: PluginEntry | LocalPlugin | None,
    extensions: tuple[PluginEntry, ...],
    catalog: Catalog,
) -> ResolvedPlugin:
    """Import what has been chosen: the owner, then the extensions."""
    assert owner is not None
    entry = owner if isinstance(owner, PluginEntry) else None
    local = owner if isinstance(owner, LocalPlugin) else None
    return ResolvedPlugin(
        architecture,
        owner.plugin if isinstance(owner, LocalPlugin) else load_checked(owner, catalog),
        entry=entry,
        local=local,
        extensions=tuple(
            (f"extension {each.name} of {each.label}", load_checked(each, catalog))
            for each in extensions
        ),
        extension_entries=extensions,
    )


def load_checked(entry: PluginEntry, catalog: Catalog) -> object:
    """The object of `entry`, imported once its distribution's requirements are known to be met."""
    check_compatible(entry, catalog.path)
    plugin = entry.load()
    logger.debug("loaded %s of %s", entry.value, entry.label)
    return plugin


def _find_extension(catalog: Catalog, name: str) -> PluginEntry:
    switches = PluginSwitches.from_environment(catalog.distributions)
    return find_named(catalog.extensions, name, switches, "extension")


def _tell_what_it_hides(local: LocalPlugin, catalog: Catalog) -> None:
    hidden = [entry.label for entry in catalog.owners(local.architecture)]
    if hidden:
        logger.warning(
            "%s is served by %s, not by the installed %s",
            local.architecture,
            local.label,
            ", ".join(hidden),
        )
    else:
        logger.info("%s is served by %s", local.architecture, local.label)
