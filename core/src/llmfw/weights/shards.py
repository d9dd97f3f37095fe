"""Declared shards: how a fused module says which tensors of the checkpoint its rows come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmfw.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """A part of a fused module's rows, under the name the checkpoint has for it.

    A module at `model.layers.0.self_attn.qkv_proj` with `weight_shards = (Shard("q_proj", 576),
    Shard("k_proj", 192), Shard("v_proj", 192))` is filled from its siblings' names:
    `model.layers.0.self_attn.q_proj.weight` and so on, one below the other along dimension 0.

    Args:
        name: Name of the sibling in the checkpoint.
        dim0: Its number of output rows, before any tensor-parallel split.
        replicas: How many neighbouring ranks share one slice (KV heads when there are more ranks
            than heads).
    """

    name: str
    dim0: int
    replicas: int = 1

    def rows(self, tp_size: int, tp_rank: int) -> tuple[int, int]:
        """Rows [start, stop) of this shard that `tp_rank` of `tp_size` column-parallel ranks holds.

        Raises:
            UsageError: If the rows do not divide by the ranks.
        """
        pieces = tp_size // self.replicas
        if pieces == 0 or tp_size % self.replicas or self.dim0 % pieces:
            raise UsageError(
                f"{self.name}: {self.dim0} rows (each shared by {self.replicas}) do not divide by "
                f"{tp_size} tensor-parallel ranks",
                hint="choose a tensor-parallel size that divides the number of heads",
            )
        size = self.dim0 // pieces
        start = tp_rank // self.replicas * size
        return start, start + size


def total_rows(shards: Iterable[Shard]) -> int:
    """Rows of all shards together, before any tensor-parallel split."""
    return sum(shard.dim0 for shard in shards)
