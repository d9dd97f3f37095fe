"""Opening an engine directory: what of it still holds here is used, the rest is left out and told.

A checkpoint that is not the one it was built from is refused; kernels, timings and the memory plan
of another machine or version are left out, for all of them can be made again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmfw.cache import add_ready_made
from llmfw.errors import CheckpointError
from llmfw.models import machine
from llmfw.models.machine import MachineFacts
from llmfw.models.manifest import EngineDefaults, EngineManifest, read_manifest
from llmfw.weights.converted_config import PluginIdentity
from llmfw.weights.source_record import digest_of
from llmfw.weights.sources import ENGINE_CHECKPOINT

logger = logging.getLogger("llmfw.models")

CACHE = "cache"
KERNELS, TUNING, MEMORY = "compiled kernels", "tuning results", "the memory plan"
_BUILD = "build the engine again: llmfw build CHECKPOINT ENGINE"


@dataclass(frozen=True)
class OpenedEngine:
    """What an engine directory gives to a run.

    Args:
        manifest: Its manifest.
        defaults: Settings that hold unless the run has its own; what was planned for another
            machine is left out.
        left_out: Parts that are not used, each with its reason.
    """

    manifest: EngineManifest
    defaults: EngineDefaults
    left_out: tuple[tuple[str, str], ...]

    def settle(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A run's own settings completed by the engine's.

        The size of the cache was planned for the lengths and numbers of the build: a run with
        others of its own gets its cache as it would without an engine.

        Args:
            given: `max_model_len`, `max_num_seqs`, `max_num_batched_tokens` and `kv_cache_memory`;
                None where the run has none.
        """
        own = any(given[name] is not None for name in given if name != "kv_cache_memory")
        defaults = {**vars(self.defaults)}
        if own:
            defaults["kv_cache_memory"] = self.manifest.defaults.kv_cache_memory
        return {name: defaults[name] if value is None else value for name, value in given.items()}


@dataclass(frozen=True)
class Stale:
    """A difference between then and now, and the parts that it makes useless."""

    reason: str
    parts: tuple[str, ...]


def open_engine(
    folder: Path, manifest: EngineManifest, device: torch.device, plugin: PluginIdentity
) -> OpenedEngine:
    """Hold an engine against this machine, and offer its kernels and timings to this process.

    Args:
        folder: The engine directory.
        manifest: From `checked_manifest`.
        device: Where the model will run.
        plugin: Who serves it here.
    """
    stale = list(differences(manifest, machine.machine_facts(device), plugin))
    useless = {part: each.reason for each in reversed(stale) for part in each.parts}
    usable, damaged = _kept_files(folder, manifest, useless)
    add_ready_made(usable)
    left_out = tuple(useless.items())
    if stale:
        reasons = "; ".join(each.reason for each in stale)
        logger.warning("%s: %s not used: %s", folder, _listed(useless), reasons)
    if damaged:
        logger.warning("%s: not as built, so left out: %s", folder, ", ".join(damaged))
    return OpenedEngine(
        manifest,
        _defaults(manifest, MEMORY not in useless, device),
        (*left_out, *((name, "not as it was built") for name in damaged)),
    )


def differences(
    manifest: EngineManifest, here: MachineFacts, plugin: PluginIdentity
) -> Iterator[Stale]:
    """What is not as it was when the engine was built."""
    then = manifest.machine
    everything = (KERNELS, TUNING, MEMORY)
    if then.device == here.device == "cpu":  # its name does not matter, what it can do does
        if then.flags != here.flags:
            yield Stale("this CPU has other features", everything)
    elif (then.device, then.name, then.capability) != (here.device, here.name, here.capability):
        yield Stale(f"it was built on {_device(then)}, this is {_device(here)}", everything)
    if then.driver != here.driver and then.device == here.device:
        yield _changed("driver", then.driver, here.driver, (TUNING, MEMORY))
    for name in ("torch", "cuda", "cupy"):
        before, now = getattr(then, name), getattr(here, name)
        if before != now and then.device == here.device:
            yield _changed(name, before, now, everything)
    core = version("llmfw-core")
    if manifest.core_version != core:
        yield _changed("llmfw-core", manifest.core_version, core, everything)
    if manifest.plugin != plugin:
        before, now = manifest.plugin.label, plugin.label
        yield Stale(f"built with {before}, {now} is here", (KERNELS, MEMORY))


def _changed(what: str, before: str, now: str, parts: tuple[str, ...]) -> Stale:
    return Stale(f"built with {what} {before or 'none'}, {now or 'none'} is here", parts)


def _device(facts: MachineFacts) -> str:
    return f"{facts.name or facts.device} ({facts.capability})"


def _listed(parts: dict[str, str]) -> str:
    names = [part for part in (KERNELS, TUNING, MEMORY) if part in parts]
    text = " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)
    return f"{text} {'are' if len(names) > 1 or names == [KERNELS] else 'is'}"


def checked_manifest(folder: Path) -> EngineManifest:
    """The manifest of an engine directory whose checkpoint is the one that it was built from.

    Weights are not looked at here: their checksums are compared when they are read.

    Raises:
        ConfigError: If the manifest is damaged or of another format.
        CheckpointError: If another file of the checkpoint is missing or has changed.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        if name.startswith(f"{ENGINE_CHECKPOINT}/") and digest_of(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name}: is not the file that the engine was built from",
                hint=f"{_BUILD}\nor run the checkpoint itself: {folder / ENGINE_CHECKPOINT}",
                file=str(folder / name),
            )
    return manifest


def _kept_files(
    folder: Path, manifest: EngineManifest, useless: dict[str, str]
) -> tuple[dict[str, Path], list[str]]:
    """The cache's files that may be used, by name, and the names of those that are damaged."""
    usable: dict[str, Path] = {}
    damaged: list[str] = []
    for name, digest in manifest.files.items():
        inside = name.removeprefix(f"{CACHE}/")
        if inside == name or part_of(inside) in useless:
            continue
        try:
            same = digest_of(folder / name) == digest
        except CheckpointError:
            same = False
        if same:
            usable[inside] = folder / name
        else:
            damaged.append(name)
    return usable, damaged


def part_of(name: str) -> str | None:
    """Which part of an engine a file of the cache belongs to."""
    if not name.startswith("kernels/"):
        return None
    return TUNING if Path(name).name.startswith("tune-") else KERNELS


def _defaults(manifest: EngineManifest, plan_holds: bool, device: torch.device) -> EngineDefaults:
    """What was asked for at the build; where the plan holds, also how large the cache is."""
    defaults, plan = manifest.defaults, manifest.memory
    if not plan_holds or defaults.kv_cache_memory is not None or plan.kv_cache == 0:
        return defaults
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        if free < plan.weights + plan.kv_cache:
            logger.warning(
                "the memory plan is not used: it takes %d bytes for weights and cache, %d are free",
                plan.weights + plan.kv_cache,
                free,
            )
            return defaults
    return replace(defaults, kv_cache_memory=plan.kv_cache)
