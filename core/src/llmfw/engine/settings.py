"""The engine's settings, with their defaults settled for a model and a device."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llmfw.errors import UsageError
from llmfw.models.engine_dir import OpenedEngine

GIB = 1 << 30
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": GIB, "t": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the user may set; None is settled by the model and the device.

    Args:
        block_size: Tokens of a cache block.
        max_model_len: Most tokens of a sequence; None: the model's positions, or what the cache
            holds.
        kv_cache_memory: Bytes of the cache, recurrent state included, a string such as "4GiB", or a
            fraction (0 .. 1] of the device's free memory. None: 0.9 of the free memory on a GPU; on
            a CPU what max_num_seqs sequences of max_model_len need, at most 1 GiB.
        enable_prefix_caching: Whether full blocks of equal prefixes are shared.
        enable_chunked_prefill: Whether a long prompt is computed over several steps.
        max_num_seqs: Most sequences in flight; fewer where the memory holds the recurrent state of
            no more.
        max_num_batched_tokens: Most tokens of a step.
        seed: Where requests without a seed of their own get it from.
        cuda_graphs: Whether decode steps are captured on a GPU and replayed.
        pipeline_depth: Steps submitted before the one before them is read; None: one on a GPU, so
            that the next step is prepared while a step runs, and none on a CPU.
    """

    block_size: int = 16
    max_model_len: int | None = None
    kv_cache_memory: int | float | str | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    seed: int = 0
    cuda_graphs: bool = True
    pipeline_depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is None and name != "block_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"{name}={value!r} is out of range", hint=f"{name} must be a whole number >= 1"
                )
        for name in ("enable_prefix_caching", "enable_chunked_prefill", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is not a switch", hint="give True or False"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(
                f"seed={self.seed!r} is not a whole number", hint="give a whole number"
            )
        parse_memory(self.kv_cache_memory)

    def on(self, device_type: str) -> EngineSettings:
        """A copy whose limits of sequences and tokens are settled for a kind of device."""
        small = device_type == "cpu"
        depth = 0 if small else 1
        changes = {
            "max_num_seqs": self.max_num_seqs or (64 if small else 256),
            "max_num_batched_tokens": self.max_num_batched_tokens or (2048 if small else 8192),
            "pipeline_depth": depth if self.pipeline_depth is None else self.pipeline_depth,
        }
        return EngineSettings(**{**self.__dict__, **changes})


def completed_by(engine: OpenedEngine | None, settings: EngineSettings) -> EngineSettings:
    """The settings, those left out taken from the engine directory that is run, if one is."""
    if engine is None:
        return settings
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory")
    return replace(settings, **engine.settle({name: getattr(settings, name) for name in names}))


def parse_memory(value: int | float | str | None) -> int | float | None:
    """Bytes as int, a fraction of the free memory as float, None as it is.

    Raises:
        UsageError: If it is none of these.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value.lower())
        if match and (size := int(float(match[1]) * _UNITS[match[2]])) > 0:
            return size
    raise UsageError(
        f"kv_cache_memory={value!r} is no amount of memory",
        hint='give bytes (1073741824), a string ("1GiB") or a fraction of the free memory (0.8)',
    )
