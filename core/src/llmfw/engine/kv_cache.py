"""The memory of the caches: how many requests' state and how many blocks fit, and K and V."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from llmfw.attention.backend import AttentionBackend
from llmfw.attention.metadata import CacheSpec, LayerCache
from llmfw.attention.state import StateSpec, slot_bytes
from llmfw.engine.settings import GIB, EngineSettings, parse_memory
from llmfw.errors import ConfigError, DeviceError

logger = logging.getLogger("llmfw.engine")

DEFAULT_FRACTION = 0.9
DEFAULT_CPU_BYTES = GIB
_PAGED_KINDS = ("full", "sliding", "latent")


def check_specs(specs: Mapping[int, CacheSpec]) -> None:
    """Refuse kinds of state that the paged cache does not serve."""
    for layer, spec in specs.items():
        if spec.kind not in _PAGED_KINDS:
            raise ConfigError(
                f"layer {layer} keeps {spec.kind!r} state, which the engine does not serve",
                hint=f"kinds served: {', '.join(_PAGED_KINDS)}; state of one size a request is "
                "declared by state_spec()",
            )


def group_of_specs(specs: Mapping[int, CacheSpec]) -> dict[CacheSpec, int]:
    """Number the groups of equal specs in the order of their first layer."""
    groups: dict[CacheSpec, int] = {}
    for layer in sorted(specs):
        groups.setdefault(specs[layer], len(groups))
    return groups


def block_bytes(specs: Mapping[int, CacheSpec], block_size: int) -> int:
    """Bytes of one block over all layers."""
    return block_size * sum(spec.bytes_per_token for spec in specs.values())


def count_sequences(
    states: Mapping[int, StateSpec],
    specs: Mapping[int, CacheSpec],
    settings: EngineSettings,
    device: torch.device,
    reserved: int = 0,
) -> int:
    """Most sequences in flight: as set, or fewer where the memory holds the state of no more.

    One more slot is for padded batches. Beside K and V the state takes at most half the memory.
    `reserved` bytes of what is free are left to steps and graphs.

    Raises:
        DeviceError: If not even one sequence's state fits.
    """
    assert settings.max_num_seqs is not None
    each = slot_bytes(states)
    if each == 0:
        return settings.max_num_seqs
    budget = _budget(settings, device, reserved) // (2 if specs else 1)
    held = budget // each - 1
    if held < 1:
        raise DeviceError(
            f"recurrent state has {budget} bytes, a sequence and a spare slot take {2 * each}",
            hint="raise kv_cache_memory",
        )
    if held < settings.max_num_seqs:
        logger.warning(
            "max_num_seqs is %d instead of %d: kv_cache_memory holds the state of no more",
            held,
            settings.max_num_seqs,
        )
    return int(min(held, settings.max_num_seqs))


def count_blocks(
    specs: Mapping[int, CacheSpec],
    settings: EngineSettings,
    max_model_len: int,
    device: torch.device,
    state_bytes: int = 0,
    reserved: int = 0,
) -> int:
    """Blocks of the cache: what the memory holds, at most what all sequences at full length need.

    None for a model that keeps no K and V. `state_bytes` of the memory are taken by other state,
    `reserved` bytes of what is free are left to steps and graphs.

    Raises:
        DeviceError: If not even one block fits.
    """
    assert settings.max_num_seqs is not None
    size = settings.block_size
    needed = settings.max_num_seqs * -(-max_model_len // size)
    each = block_bytes(specs, size)
    if each == 0:
        return 0
    budget = _budget(settings, device, reserved) - state_bytes
    blocks = min(needed, budget // each)
    if blocks < 1:
        raise DeviceError(
            f"the KV cache has {max(budget, 0)} bytes, one block of {size} tokens takes {each}",
            hint="raise kv_cache_memory or lower block_size"
            + _reserved_hint(settings, state_bytes, reserved),
        )
    return int(blocks)


def allocate(
    specs: Mapping[int, CacheSpec],
    num_blocks: int,
    block_size: int,
    device: torch.device,
    backend: AttentionBackend,
) -> dict[int, LayerCache]:
    """K and V by layer, in the layout of the attention backend."""
    groups = group_of_specs(specs)
    return {
        layer: backend.allocate(spec, num_blocks, block_size, device, groups[spec])
        for layer, spec in specs.items()
    }


def _reserved_hint(settings: EngineSettings, state_bytes: int, reserved: int) -> str:
    lines = ""
    if reserved and not isinstance(parse_memory(settings.kv_cache_memory), int):
        lines += (
            f"\nor lower max_num_batched_tokens or max_num_seqs: a step and its graphs take "
            f"{reserved} bytes"
        )
    if state_bytes:
        lines += f"\nor lower max_num_seqs: recurrent state takes {state_bytes} bytes"
    return lines


def _budget(settings: EngineSettings, device: torch.device, reserved: int) -> int:
    """Bytes for caches; an amount that the user names is not lessened by what is reserved."""
    memory = parse_memory(settings.kv_cache_memory)
    if isinstance(memory, int):
        return memory
    if memory is None and device.type == "cpu":
        return DEFAULT_CPU_BYTES
    left = max(0, free_memory(device) - reserved)
    return int(left * (DEFAULT_FRACTION if memory is None else memory))


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on a CPU, those of the machine that can be had without swapping."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        logger.warning(
            "free memory cannot be read here; the KV cache gets %d bytes", DEFAULT_CPU_BYTES
        )
    return DEFAULT_CPU_BYTES
