"""The plugin of a model as a worker process gets it: exactly the same one is loaded, or none."""

from __future__ import annotations

from dataclasses import dataclass

from llmfw.errors import PluginConflictError, PluginContractError, PluginLoadError, UsageError
from llmfw.plugins.catalog import EXTENSIONS, MODELS, Catalog, PluginEntry
from llmfw.plugins.local import find_local, load_plugin_module
from llmfw.plugins.resolve import ResolvedPlugin, load_resolved


@dataclass(frozen=True)
class EntryReference:
    """An installed entry point: what it is called and which version was found."""

    group: str
    name: str
    value: str
    dist: str
    version: str

    @property
    def label(self) -> str:
        """Distribution and version."""
        return f"{self.dist} {self.version}"


@dataclass(frozen=True)
class PluginReference:
    """What identifies a resolved plugin; small, and it can be pickled.

    Args:
        architecture: What it serves.
        entry: The installed entry point; None for a local plugin.
        path: The file of a local plugin.
        sha256: The digest that the file must have.
        extensions: The extensions, in their order.
    """

    architecture: str
    entry: EntryReference | None = None
    path: str | None = None
    sha256: str | None = None
    extensions: tuple[EntryReference, ...] = ()


def reference_to(resolved: ResolvedPlugin) -> PluginReference:
    """What another process needs to load the same plugin.

    Raises:
        UsageError: If it was registered by the running script or an interactive session, which
            another process cannot import.
    """
    extensions = tuple(_entry_reference(entry) for entry in resolved.extension_entries)
    if resolved.entry is not None:
        entry = _entry_reference(resolved.entry)
        return PluginReference(resolved.architecture, entry, extensions=extensions)
    local = resolved.local
    assert local is not None
    if local.is_main or local.path is None:
        raise UsageError(
            f"{resolved.architecture} is registered by the running script ({local.origin}),"
            " which other ranks cannot import",
            hint="move the class to a file of its own and name that file:"
            " --plugin-module my_model.py (in Python: plugin_modules=['my_model.py'])\n"
            "or run with one rank",
        )
    return PluginReference(
        resolved.architecture, None, str(local.path), local.sha256, extensions=extensions
    )


def load_reference(reference: PluginReference, catalog: Catalog | None = None) -> ResolvedPlugin:
    """Load exactly the plugin that `reference` names.

    Args:
        reference: From `reference_to`, in another process.
        catalog: What is installed here; scanned when left out.

    Raises:
        PluginConflictError: If another version, or another file, is found here.
        PluginLoadError: If its code fails to import.
    """
    catalog = catalog or Catalog.scan()
    extensions = tuple(_find(extension, catalog) for extension in reference.extensions)
    if reference.entry is not None:
        entry = _find(reference.entry, catalog)
        return load_resolved(reference.architecture, entry, extensions, catalog)
    assert reference.path is not None
    load_plugin_module(reference.path)
    local = find_local(reference.architecture)
    if local is None:
        raise PluginContractError(
            f"{reference.path} does not register {reference.architecture} in this process",
            hint="register it whenever the file is imported, not under a condition",
        )
    if local.sha256 != reference.sha256:
        raise PluginConflictError(
            f"{reference.path} is not the file that the first rank loaded: its digest differs",
            hint="give every rank the same file, and do not change it while they start",
        )
    return load_resolved(reference.architecture, local, extensions, catalog)


def _entry_reference(entry: PluginEntry) -> EntryReference:
    return EntryReference(entry.group, entry.name, entry.value, entry.dist, entry.version)


def _find(wanted: EntryReference, catalog: Catalog) -> PluginEntry:
    """The entry of this installation that is the very same.

    Raises:
        PluginLoadError: If the distribution is not installed here.
        PluginConflictError: If it is, in another version.
    """
    groups = {MODELS: catalog.models, EXTENSIONS: catalog.extensions}
    here = [e for e in groups[wanted.group].get(wanted.name, ()) if e.dist == wanted.dist]
    for entry in here:
        if (entry.version, entry.value) == (wanted.version, wanted.value):
            return entry
    if here:
        raise PluginConflictError(
            f"the first rank loaded {wanted.label} ({wanted.value}),"
            f" this one has {here[0].label} ({here[0].value})",
            hint=f"install the same everywhere: pip install {wanted.dist}=={wanted.version}",
        )
    raise PluginLoadError(
        f"the first rank loaded {wanted.label}, which is not installed for this one",
        hint=f"install it everywhere: pip install {wanted.dist}=={wanted.version}",
    )
