"""Which installed plugin serves an architecture: exactly one, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from llmfw.errors import PluginConflictError, UnknownArchitectureError, UsageError
from llmfw.plugins.switches import PluginSwitches, nearest_hint

if TYPE_CHECKING:
    from llmfw.plugins.catalog import Catalog, PluginEntry


def choose_owner(catalog: Catalog, architecture: str, prefer: str | None = None) -> PluginEntry:
    """The entry of `catalog` that serves `architecture`; see `Catalog.find`."""
    switches = PluginSwitches.from_environment(catalog.distributions)
    owners = catalog.models.get(architecture, ())
    if prefer is not None:
        owners = _demanded(catalog, architecture, prefer)
    allowed = [entry for entry in owners if switches.refusal(entry.dist) is None]
    if not allowed:
        raise unknown_architecture(catalog, architecture, switches)
    return one_of(allowed, switches, f"the architecture {architecture!r}", flag="--plugin")


def one_of(
    entries: list[PluginEntry], switches: PluginSwitches, what: str, *, flag: str | None = None
) -> PluginEntry:
    """The only entry, or the one that LLMFW_PREFER names first.

    Raises:
        PluginConflictError: If several are left.
    """
    if len(entries) == 1:
        return entries[0]
    for name in switches.prefer:
        preferred = [entry for entry in entries if entry.key == name]
        if len(preferred) == 1:
            return preferred[0]
    raise _conflict(entries, what, flag)


def unknown_architecture(
    catalog: Catalog, architecture: str, switches: PluginSwitches | None = None
) -> UnknownArchitectureError:
    """The error for an architecture that nobody serves: what is installed, near, to be done."""
    switches = switches or PluginSwitches()
    lines = [f"no installed plugin serves the architecture {architecture!r}"]
    for entry in catalog.models.get(architecture, ()):
        lines.append(f"{entry.label} would, but is {switches.refusal(entry.dist)}")
    lines.append(f"installed: {_served(catalog)}")
    near = get_close_matches(architecture, catalog.models, n=3)
    if near and architecture not in near:
        lines.append(f"nearest: {', '.join(near)}")
    return UnknownArchitectureError(
        "\n".join(lines),
        hint="install the plugin that serves it: pip install llmfw-<family>, or a third party's\n"
        "or write one, and try it before it is packaged: --plugin-module my_model.py\n"
        "llmfw plugins list shows what is installed",
        architecture=architecture,
        nearest=near,
    )


def _demanded(catalog: Catalog, architecture: str, prefer: str) -> tuple[PluginEntry, ...]:
    owned = catalog.distributions.get(canonicalize_name(prefer))
    if owned is None:
        raise UsageError(
            f"--plugin {prefer}: no plugin of that name is installed",
            hint=nearest_hint(prefer, catalog.distributions, "installed"),
        )
    serving = tuple(entry for entry in catalog.models.get(architecture, ()) if entry in owned)
    if not serving:
        serves = ", ".join(e.name for e in owned if e.group == "llmfw.models") or "no architecture"
        raise UnknownArchitectureError(
            f"--plugin {prefer}: {owned[0].label} does not serve the architecture {architecture!r}",
            hint=f"it serves: {serves}\nleave --plugin out to take whichever plugin does",
            architecture=architecture,
            dist=owned[0].dist,
        )
    return serving


def _served(catalog: Catalog) -> str:
    by_label: dict[str, list[str]] = {}
    for architecture, entries in catalog.models.items():
        for entry in entries:
            by_label.setdefault(entry.label, []).append(architecture)
    return "; ".join(
        f"{label} ({', '.join(names)})" for label, names in sorted(by_label.items())
    ) or ("no model plugin")


def _conflict(entries: list[PluginEntry], what: str, flag: str | None) -> PluginConflictError:
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if len(labels) == 1:
        values = " and ".join(entry.value for entry in entries)
        return PluginConflictError(
            f"{labels[0]} declares {what} twice: {values}",
            hint="this is a fault of its metadata: report it to its authors",
            owners=labels,
        )
    dists = [entry.dist for entry in entries]
    cures = [f"set LLMFW_PREFER={dists[0]} (or {', '.join(dists[1:])})"]
    if flag:
        cures.insert(0, f"choose one: {' or '.join(f'{flag} {dist}' for dist in dists)}")
    cures.append(f"or uninstall one: pip uninstall {dists[-1]}")
    return PluginConflictError(
        f"{what} is served by {len(labels)} installed plugins: {', '.join(labels)}",
        hint="\n".join(cures),
        owners=labels,
    )


def find_named(
    groups: Mapping[str, Iterable[PluginEntry]], name: str, switches: PluginSwitches, word: str
) -> PluginEntry:
    """The entry called `name` in one group (an extension, an alias).

    Raises:
        UsageError: If there is none.
        PluginConflictError: If several distributions declare it.
    """
    entries = [entry for entry in groups.get(name, ()) if switches.refusal(entry.dist) is None]
    if not entries:
        refused = [
            f"{e.label} has it, but is {switches.refusal(e.dist)}" for e in groups.get(name, ())
        ]
        raise UsageError(
            "\n".join([f"no installed plugin has the {word} {name!r}", *refused]),
            hint=nearest_hint(name, list(groups), "installed"),
        )
    return one_of(entries, switches, f"the {word} {name!r}")
