"""The sequences of one beam search in the scheduler, and the cache blocks that they share."""

from __future__ import annotations

import collections.abc
from typing import TYPE_CHECKING, NamedTuple

from llmfw.engine.step import Fork

if TYPE_CHECKING:
    from llmfw.engine.sequence import Sequence


class Move(NamedTuple):
    """The sequence `seq_id` goes on from the tokens of `parent` with `token`."""

    seq_id: int
    parent: int
    token: int


Moves = collections.abc.Sequence[Move]


class BeamGroup:
    """Beams with one prompt: full blocks are shared, the last one is copied when beams part.

    All blocks that the search can come to need are taken when it starts. So a group is never
    preempted and never waits for blocks, whatever the others do (TensorRT-LLM's "guaranteed no
    evict"), and beams part and die without the pool being asked.

    Args:
        members: Its sequences; the first computes the prompt.
        block_size: Tokens of a cache block; None for a model without a cache.
    """

    def __init__(self, members: list[Sequence], block_size: int | None) -> None:
        self.members = members
        self.blocks: list[int] = []  # all, in the order in which the pool has them back
        self._by_id = {member.seq_id: member for member in members}
        self._block_size = block_size
        self._prompt_len = members[0].num_tokens
        self._shared = self._prompt_len // block_size if block_size else 0

    @property
    def num_blocks(self) -> int:
        """Blocks that the search needs at most."""
        if not self._block_size:
            return 0
        longest = -(-self.members[0].limit // self._block_size)
        return self._shared + len(self.members) * (longest - self._shared)

    def seat(self, blocks: list[int]) -> None:
        """Take the blocks, those of the prompt first; the first sequence gets what it computes."""
        self.blocks = blocks
        if self._block_size:
            self.members[0].blocks = blocks[: -(-self._prompt_len // self._block_size)]

    def fork(self, moves: Moves) -> list[Fork]:
        """Let sequences go on, each one token longer; those without a move rest.

        A sequence that others go on from goes on from its own tokens, too.
        """
        length = self._by_id[moves[0].parent].num_computed
        places = self._part(moves, length) if self._block_size else [(0, 0)] * len(moves)
        for member in self.members:
            member.num_tokens = member.num_computed = length
        for move in moves:
            self._by_id[move.seq_id].num_tokens = length + 1
        return [
            Fork(move.seq_id, move.parent, length, move.token, *place)
            for move, place in zip(moves, places, strict=True)
        ]

    def _part(self, moves: Moves, length: int) -> list[tuple[int, int]]:
        """Give each moving sequence its blocks; for each the block to copy, and where to."""
        assert self._block_size is not None
        full, used = divmod(length, self._block_size)
        before = {member.seq_id: member.blocks for member in self.members}
        # The block that is partly filled stays with the parent, whose other children copy it.
        stay = {move.parent for move in moves} if used else set()
        assert stay <= {move.seq_id for move in moves if move.seq_id == move.parent}
        kept = {block for move in moves for block in before[move.parent][self._shared : full]}
        kept |= {before[parent][full] for parent in stay}
        spare = [block for block in self.blocks[self._shared :] if block not in kept]
        for member in self.members:
            member.blocks = []
        places = []
        for move in moves:
            parent, child = before[move.parent], self._by_id[move.seq_id]
            target = parent[full] if move.seq_id in stay else spare.pop()
            child.blocks = [*parent[:full], target]
            child.moved = child.blocks != before[move.seq_id]
            places.append((parent[full] if used else target, target))
        return places


def longest_beams(num_beams: int, prompt_len: int, num_blocks: int, block_size: int) -> int:
    """Most tokens, prompt and output, of beams that have the whole cache to themselves."""
    shared = prompt_len // block_size
    return (shared + (num_blocks - shared) // num_beams) * block_size
