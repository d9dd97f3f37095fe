"""A distribution's own requirements, held against what is installed, before it is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from llmfw.errors import PluginIncompatibleError

if TYPE_CHECKING:
    from llmfw.plugins.catalog import PluginEntry


@dataclass(frozen=True)
class Misfit:
    """One requirement that the environment does not meet.

    Args:
        requirement: The Requires-Dist line.
        installed: The installed version, or None where the distribution is missing.
        reason: For people.
    """

    requirement: str
    installed: str | None
    reason: str


def misfits(
    requires: Sequence[str], path: Sequence[str] | None = None, extras: frozenset[str] = frozenset()
) -> list[Misfit]:
    """The requirements that are not met, markers and extras evaluated for this interpreter.

    Args:
        requires: Requires-Dist lines.
        path: Where installed distributions are looked for; None for `sys.path`.
        extras: Extras of the distribution that were asked for. Lines of other extras do not count.
    """
    return list(_misfits(requires, path, extras, set()))


def _misfits(
    requires: Sequence[str], path: Sequence[str] | None, extras: frozenset[str], seen: set[str]
) -> Iterator[Misfit]:
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as exc:
            yield Misfit(line, None, f"requires {line!r}, which cannot be read: {exc}")
            continue
        if not _applies(requirement, extras):
            continue
        bare = _without_marker(requirement)
        dist = _find(requirement.name, path)
        if dist is None:
            yield Misfit(bare, None, f"requires {bare}, which is not installed")
        elif not requirement.specifier.contains(dist.version, prereleases=True):
            yield Misfit(bare, dist.version, f"requires {bare}, installed is {dist.version}")
        elif requirement.extras and bare not in seen:
            seen.add(bare)
            yield from _misfits(dist.requires or (), path, _normalised(requirement.extras), seen)


def _normalised(extras: set[str]) -> frozenset[str]:
    return frozenset(str(canonicalize_name(extra)) for extra in extras)


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Whether the line counts: without extras the plain lines do, with extras only theirs."""
    if requirement.marker is None:
        return not extras
    if requirement.marker.evaluate({"extra": ""}):
        return not extras
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def _without_marker(requirement: Requirement) -> str:
    plain = Requirement(str(requirement))
    plain.marker = None
    return str(plain)


def _find(name: str, path: Sequence[str] | None) -> metadata.Distribution | None:
    wanted = canonicalize_name(name)
    if path is None:
        found = metadata.distributions(name=str(wanted))
    else:
        found = metadata.distributions(name=str(wanted), path=list(path))
    return next((dist for dist in found if dist.metadata["Name"] and dist.version), None)


def check_compatible(entry: PluginEntry, path: Sequence[str] | None = None) -> None:
    """Refuse a plugin whose metadata rule out what is installed.

    Raises:
        PluginIncompatibleError: Listing every requirement that is not met.
    """
    found = misfits(entry.requires, path)
    if not found:
        return
    lines = [f"{entry.label} does not fit what is installed:"]
    lines += [f"  {misfit.reason}" for misfit in found]
    wanted = " ".join(f"'{misfit.requirement}'" for misfit in found)
    raise PluginIncompatibleError(
        "\n".join(lines),
        hint=f"update the plugin: pip install --upgrade {entry.dist}\n"
        f"or install what it asks for: pip install {wanted}",
        dist=entry.dist,
        version=entry.version,
        misfits=found,
    )
