"""Which part of the model one process owns: tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from llmfw.errors import UsageError


@dataclass(frozen=True)
class Mapping:
    """Ranks of a parallel run; a single process is `Mapping()`.

    Ranks are laid out with tensor parallelism innermost: rank = pp_rank * tp_size + tp_rank.
    """

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.pp_size < 1 or self.world_size != self.tp_size * self.pp_size:
            raise UsageError(
                f"world_size {self.world_size} is not tp_size {self.tp_size} x "
                f"pp_size {self.pp_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is not in 0..{self.world_size - 1}")

    @property
    def tp_rank(self) -> int:
        """Position within the tensor-parallel group."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // self.tp_size

    def layers_of_stage(self, num_layers: int) -> range:
        """The decoder layers that this pipeline stage owns; earlier stages take the remainder."""
        base, extra = divmod(num_layers, self.pp_size)
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return range(start, start + base + (self.pp_rank < extra))
