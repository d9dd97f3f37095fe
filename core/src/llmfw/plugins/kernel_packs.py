"""Kernel packs: every installed one may offer kernels; a broken one is left out and named."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfw.errors import LlmfwError, PluginConflictError, PluginContractError
from llmfw.plugins.catalog import Catalog, PluginEntry
from llmfw.plugins.choose import one_of
from llmfw.plugins.contract import contract_error
from llmfw.plugins.host import PluginHost
from llmfw.plugins.resolve import load_checked
from llmfw.plugins.switches import PluginSwitches

if TYPE_CHECKING:
    from llmfw.ops.kernel import DeviceInfo, Kernel

logger = logging.getLogger("llmfw.plugins")


@dataclass(frozen=True)
class PackProblem:
    """A kernel pack that was left out.

    Args:
        pack: Its name.
        label: Its distribution and version.
        error: Why.
    """

    pack: str
    label: str
    error: LlmfwError

    @property
    def reason(self) -> str:
        """Why, in one line."""
        first, *more = self.error.message.splitlines()
        return f"{first} {'; '.join(line.strip() for line in more)}" if first[-1:] == ":" else first


Packs = list[tuple[PluginEntry, object]]


def load_kernel_packs(
    device_features: Collection[str],
    catalog: Catalog | None = None,
    wanted: Sequence[str] = (),
) -> tuple[Packs, list[PackProblem]]:
    """Load the installed kernel packs that this device may use.

    Args:
        device_features: What the device can do. A pack object with an attribute `requires` (feature
            names that every kernel of it needs) is passed over in silence where one is missing.
        catalog: What is installed; scanned when left out.
        wanted: What the user asked for by name: "cupy", "cupy.rms_norm" for one kernel of it,
            "rms_norm=cupy" for one op. Names with a minus count as not asked for.

    Returns:
        The packs as (entry, object), and those that were left out.

    Raises:
        PluginError: If a pack of `wanted` cannot be loaded, with that pack's own error.
    """
    catalog = catalog or Catalog.scan()
    asked_for = _asked_for(wanted)
    packs: Packs = []
    problems: list[PackProblem] = []
    for name, entries in _allowed(catalog):
        try:
            entry, plugin = _load_pack(name, entries, catalog)
        except LlmfwError as error:
            label = ", ".join(dict.fromkeys(entry.label for entry in entries))
            _leave_out(PackProblem(name, label, error), problems, name in asked_for)
            continue
        if set(getattr(plugin, "requires", ())) <= set(device_features) or name in asked_for:
            packs.append((entry, plugin))
    return packs, problems


def collect_kernels(
    packs: Packs, device: DeviceInfo, wanted: Sequence[str] = ()
) -> tuple[list[Kernel], list[PackProblem]]:
    """Ask each pack for its kernels on `device`, each marked with its pack's name.

    Args:
        packs: From `load_kernel_packs`.
        device: The device and its features.
        wanted: As for `load_kernel_packs`.

    Raises:
        PluginError: If a pack of `wanted` raises or returns what is no kernel.
    """
    asked_for = _asked_for(wanted)
    kernels: list[Kernel] = []
    problems: list[PackProblem] = []
    for entry, plugin in packs:
        try:
            kernels += _ask(entry, plugin, device)
        except LlmfwError as error:
            problem = PackProblem(entry.name, entry.label, error)
            _leave_out(problem, problems, entry.name in asked_for)
    return kernels, problems


class _NoDefaults:
    """A pack is asked alone: core's reference implementations are not kernels."""


def pack_host(entry: PluginEntry, plugin: object) -> PluginHost:
    """A host for one kernel pack; making it holds the pack against the contract."""
    return PluginHost(
        plugin, name=f"kernel pack {entry.name} of {entry.label}", defaults=_NoDefaults()
    )


def _asked_for(wanted: Sequence[str]) -> set[str]:
    names = (name.rpartition("=")[2] for name in wanted)
    return {name.partition(".")[0] for name in names if not name.startswith("-")}


def _allowed(catalog: Catalog) -> Iterator[tuple[str, list[PluginEntry]]]:
    switches = PluginSwitches.from_environment(catalog.distributions)
    for name, entries in catalog.kernels.items():
        allowed = [entry for entry in entries if switches.refusal(entry.dist) is None]
        if allowed:
            yield name, allowed


def _load_pack(
    name: str, entries: list[PluginEntry], catalog: Catalog
) -> tuple[PluginEntry, object]:
    switches = PluginSwitches.from_environment(catalog.distributions)
    entry = one_of(entries, switches, f"the kernel pack {name!r}")
    plugin = load_checked(entry, catalog)
    pack_host(entry, plugin)
    return entry, plugin


def _ask(entry: PluginEntry, plugin: object, device: DeviceInfo) -> list[Kernel]:
    host = pack_host(entry, plugin)
    found: list[Kernel] = []
    for offered in host.hook.llmfw_kernels(device=device):
        if not isinstance(offered, list | tuple):
            raise _not_kernels(host, offered)
        for kernel in offered:
            if not _is_kernel(kernel):
                raise _not_kernels(host, kernel)
            found.append(kernel.from_pack(entry.name))
    return found


def _is_kernel(kernel: Any) -> bool:
    facts = (getattr(kernel, name, None) for name in ("op", "name", "factory"))
    return all(isinstance(fact, str) and fact for fact in facts) and hasattr(kernel, "from_pack")


def _not_kernels(host: PluginHost, offered: object) -> PluginContractError:
    fault = f"llmfw_kernels returned {type(offered).__name__}, expected a list of llmfw.Kernel"
    return contract_error(host.name, [fault])


def _leave_out(problem: PackProblem, problems: list[PackProblem], asked_for: bool) -> None:
    if asked_for:
        raise problem.error
    problems.append(problem)
    if isinstance(problem.error, PluginConflictError):
        logger.warning("the kernel pack %s is left out: %s", problem.pack, problem.reason)
    else:
        logger.warning(
            "the kernel pack %s of %s is left out: %s", problem.pack, problem.label, problem.reason
        )
