"""Which installed plugin serves an architecture: exactly one, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from llmfw.errors import PluginConflictError, UnknownArchitectureError, UsageError
from llmfw.plugins.switches import PluginSwitches, nearest_hint

if TYPE_CHECKING:
    from llmfw.plugins.catalog import Catalog, PluginEntry


FALLBACK = "*"
"""The name in `llmfw.models` of a plugin that serves architectures which no other one owns."""


def choose_owner(
    catalog: Catalog, architecture: str, prefer: str | None = None, *, fallback: bool = True
) -> PluginEntry:
    """The entry of `catalog` that serves `architecture`; see `Catalog.find`."""
    switches = PluginSwitches.from_environment(catalog.distributions)
    if not fallback:
        switches = replace(switches, no_fallback="--no-fallback")
    owners = catalog.owners(architecture)
    fallbacks = () if switches.no_fallback else catalog.models.get(FALLBACK, ())
    if prefer is not None:
        owners = fallbacks = _demanded(catalog, architecture, prefer, (*owners, *fallbacks))
    allowed = [entry for entry in owners if switches.refusal(entry.dist) is None]
    if allowed:
        return one_of(allowed, switches, f"the architecture {architecture!r}", flag="--plugin")
    allowed = [entry for entry in fallbacks if switches.refusal(entry.dist) is None]
    if allowed:
        what = f"the architecture {architecture!r}, which only fallbacks serve,"
        return one_of(allowed, switches, what, flag="--plugin")
    raise unknown_architecture(catalog, architecture, switches)


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
    catalog: Catalog,
    architecture: str,
    switches: PluginSwitches | None = None,
    *,
    refusal: str | None = None,
) -> UnknownArchitectureError:
    """The error for an architecture that nobody serves: what is installed, near, to be done.

    Args:
        catalog: What is installed.
        architecture: What was asked for.
        switches: What the environment says of plugins.
        refusal: Why a fallback that was asked does not serve it either, in one sentence.
    """
    switches = switches or PluginSwitches()
    lines = [f"no installed plugin serves the architecture {architecture!r}"]
    for entry in catalog.owners(architecture):
        off = switches.refusal(entry.dist)
        lines += [f"{entry.label} would, but is {off}"] if off else []
    if refusal is None:
        for entry in catalog.models.get(FALLBACK, ()):
            off = switches.refusal(entry.dist) or f"switched off by {switches.no_fallback}"
            lines.append(f"{entry.label}, a fallback, might, but is {off}")
    else:
        lines.append(refusal)
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


def _demanded(
    catalog: Catalog, architecture: str, prefer: str, candidates: tuple[PluginEntry, ...]
) -> tuple[PluginEntry, ...]:
    owned = catalog.distributions.get(canonicalize_name(prefer))
    if owned is None:
        raise UsageError(
            f"--plugin {prefer}: no plugin of that name is installed",
            hint=nearest_hint(prefer, catalog.distributions, "installed"),
        )
    serving = tuple(entry for entry in candidates if entry in owned)
    serving = tuple(entry for entry in serving if entry.name == architecture) or serving
    if not serving:
        names = [_name_of(entry) for entry in owned if entry.group == "llmfw.models"]
        serves = ", ".join(names) or "no architecture"
        raise UnknownArchitectureError(
            f"--plugin {prefer}: {owned[0].label} does not serve the architecture {architecture!r}",
            hint=f"it serves: {serves}\nleave --plugin out to take whichever plugin does",
            architecture=architecture,
            dist=owned[0].dist,
        )
    return serving


def _name_of(entry: PluginEntry) -> str:
    return "the fallback, for others" if entry.name == FALLBACK else entry.name


def _served(catalog: Catalog) -> str:
    by_label: dict[str, list[str]] = {}
    for entries in catalog.models.values():
        for entry in entries:
            by_label.setdefault(entry.label, []).append(_name_of(entry))
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
