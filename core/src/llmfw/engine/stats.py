"""What the engine is doing and has done."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of queue and cache, and counters since the start.

    waiting, running: sequences in the queue and in flight.
    kv_blocks, kv_blocks_used: the cache's blocks and those that sequences hold.
    prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache and found there.
    prompt_tokens, generated_tokens: of all requests, as they were added and made.
    """

    waiting: int
    running: int
    requests: int
    finished: int
    aborted: int
    failed: int
    steps: int
    preemptions: int
    kv_blocks: int
    kv_blocks_used: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def kv_usage(self) -> float:
        """Part of the cache that is held, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks if self.kv_blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the looked-up prompt tokens that were found, 0 to 1."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0

    def as_dict(self) -> dict[str, float]:
        """All fields and both rates, for JSON."""
        return {**asdict(self), "kv_usage": self.kv_usage, "prefix_hit_rate": self.prefix_hit_rate}


@dataclass(slots=True)
class Counters:
    """What the engine counts itself."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
