"""What is installed, read from the metadata of distributions alone; imports no plugin."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata

from packaging.utils import canonicalize_name

from llmfw.errors import PluginLoadError
from llmfw.plugins.choose import FALLBACK, choose_owner

MODELS, KERNELS, EXTENSIONS, ALIASES = (
    "llmfw.models",
    "llmfw.kernels",
    "llmfw.extensions",
    "llmfw.aliases",
)
GROUPS = (MODELS, KERNELS, EXTENSIONS, ALIASES)

_VALUE = re.compile(r"^(?P<module>[\w.]+)\s*(:\s*(?P<attribute>[\w.]+)\s*)?$")


@dataclass(frozen=True)
class PluginEntry:
    """One entry point of one installed distribution.

    Args:
        group: One of `GROUPS`.
        name: In `llmfw.models` the architecture, or "*" for a fallback; else the name of the pack,
            extension or alias.
        value: "module:attribute" or "module".
        dist: The distribution's name, as it spells it.
        version: Its version.
        requires: Its Requires-Dist lines.
    """

    group: str
    name: str
    value: str
    dist: str
    version: str
    requires: tuple[str, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """Distribution and version, e.g. "llmfw-foo 0.1.0"."""
        return f"{self.dist} {self.version}"

    @property
    def is_fallback(self) -> bool:
        """Whether it serves the architectures that no other plugin owns."""
        return self.group == MODELS and self.name == FALLBACK

    @property
    def key(self) -> str:
        """The distribution's normalised name."""
        return str(canonicalize_name(self.dist))

    def load(self) -> object:
        """Import the object that the entry point names.

        Raises:
            PluginLoadError: If the import fails, in whatever way; the original exception is
                chained.
        """
        match = _VALUE.match(self.value)
        if match is None:
            raise self._load_error("the entry point is not of the form module:attribute")
        try:
            target: object = importlib.import_module(match["module"])
            for attribute in filter(None, (match["attribute"] or "").split(".")):
                target = getattr(target, attribute)
        except (Exception, SystemExit) as exc:
            raise self._load_error(f"{type(exc).__name__}: {exc}") from exc
        return target

    def _load_error(self, reason: str) -> PluginLoadError:
        return PluginLoadError(
            f"{self.label} cannot be loaded "
            f"(entry point {self.name} = {self.value} in {self.group}): {reason}",
            hint=f"update or repair it: pip install --upgrade {self.dist}\n"
            f"or remove it: pip uninstall {self.dist}\n"
            "llmfw plugins doctor checks each installed plugin",
            dist=self.dist,
            version=self.version,
            entry_point=self.value,
        )


@dataclass(frozen=True)
class Catalog:
    """The plugins at hand, from entry-point metadata.

    Args:
        entries: All entry points of our groups, sorted by group, name and distribution.
        problems: Distributions whose metadata cannot be read, one line each.
        path: Where was looked; None for `sys.path`.
    """

    entries: tuple[PluginEntry, ...]
    problems: tuple[str, ...] = ()
    path: tuple[str, ...] | None = None

    @classmethod
    def scan(cls, path: Sequence[str] | None = None) -> Catalog:
        """Read the metadata of every distribution on `path` (default: `sys.path`).

        A distribution found twice (an editable install seen through two folders) counts once, the
        first one on the path, which is the one that Python imports.
        """
        found: dict[str, tuple[PluginEntry, ...]] = {}
        problems: list[str] = []
        places = None if path is None else tuple(path)
        for dist in _distributions(places):
            try:
                text = dist.read_text("entry_points.txt")
                if text is None or "llmfw." not in text:
                    continue
                name, version = dist.metadata["Name"], dist.version
                if not name or not version:
                    raise ValueError("its METADATA lacks Name or Version")
                found.setdefault(str(canonicalize_name(name)), tuple(_entries_of(dist)))
            except Exception as exc:  # a damaged distribution must not hide the sound ones
                problems.append(f"{_place_of(dist)}: {exc}")
        entries = sorted(
            (entry for owned in found.values() for entry in owned),
            key=lambda entry: (entry.group, entry.name, entry.key),
        )
        return cls(tuple(entries), tuple(problems), places)

    @cached_property
    def models(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """Architecture -> the entries that serve it; fallbacks are under "*"."""
        return self._group(MODELS)

    @cached_property
    def kernels(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """Kernel pack -> its entries."""
        return self._group(KERNELS)

    @cached_property
    def extensions(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """Extension -> its entries."""
        return self._group(EXTENSIONS)

    @cached_property
    def aliases(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """Model alias -> the functions that give its path."""
        return self._group(ALIASES)

    @cached_property
    def distributions(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """Normalised distribution name -> its entries."""
        return _grouped((entry.key, entry) for entry in self.entries)

    def owners(self, architecture: str) -> tuple[PluginEntry, ...]:
        """The entries that serve `architecture` by its name, which fallbacks do not."""
        return () if architecture == FALLBACK else self.models.get(architecture, ())

    def find(
        self, architecture: str, prefer: str | None = None, *, fallback: bool = True
    ) -> PluginEntry:
        """The one entry that serves `architecture`: its owner, else a fallback.

        Args:
            architecture: As in `config.json`.
            prefer: The distribution that must serve it (`--plugin`). Without it, LLMFW_PREFER
                decides between several owners.
            fallback: Whether a fallback may serve it; LLMFW_NO_FALLBACK=1 rules them out, too.

        Raises:
            UnknownArchitectureError: If none serves it, or `prefer` does not.
            PluginConflictError: If several do and none was chosen.
            UsageError: If `prefer` or a plugin variable of the environment names what is not
                installed.
        """
        return choose_owner(self, architecture, prefer, fallback=fallback)

    def _group(self, group: str) -> Mapping[str, tuple[PluginEntry, ...]]:
        return _grouped((entry.name, entry) for entry in self.entries if entry.group == group)


def _grouped(
    pairs: Iterable[tuple[str, PluginEntry]],
) -> dict[str, tuple[PluginEntry, ...]]:
    groups: dict[str, tuple[PluginEntry, ...]] = {}
    for key, entry in pairs:
        groups[key] = (*groups.get(key, ()), entry)
    return groups


def _distributions(path: tuple[str, ...] | None) -> Iterator[metadata.Distribution]:
    if path is None:
        yield from metadata.distributions()
    else:
        yield from metadata.distributions(path=list(path))


def _entries_of(dist: metadata.Distribution) -> Iterator[PluginEntry]:
    requires = tuple(dist.requires or ())
    seen: set[tuple[str, str, str]] = set()
    for point in dist.entry_points:
        identity = (point.group, point.name, point.value)
        if point.group in GROUPS and identity not in seen:
            seen.add(identity)
            yield PluginEntry(*identity, dist.metadata["Name"], dist.version, requires)


def _place_of(dist: metadata.Distribution) -> str:
    return str(getattr(dist, "_path", "a distribution without a path"))
