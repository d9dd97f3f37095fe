"""Sequences under way as the scheduler sees them, and what a step in the making gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw.engine.step import NewRequest

if TYPE_CHECKING:
    from llmfw.engine.beam_group import BeamGroup


class Sequence:
    """One completion under way, as the scheduler sees it.

    Args:
        new: What the worker is told at the first chunk.
        limit: Tokens, prompt and output, at which it ends.
        most_cached: Tokens that cached blocks may spare it; None: as many as there are. Those whose
            logits are wanted have to be computed.

    A beam has a `group`: no token of it is promised, for what follows is chosen among all beams.
    """

    __slots__ = (
        "blocks", "digests", "group", "limit", "most_cached", "moved", "new", "num_cached",
        "num_computed", "num_named", "num_tokens", "seq_id", "started", "tokens",
    )  # fmt: skip

    def __init__(self, new: NewRequest, limit: int, *, most_cached: int | None = None) -> None:
        self.seq_id = new.seq_id
        self.new = new
        self.limit = limit
        self.most_cached = most_cached
        self.tokens = list(new.prompt_token_ids)  # those whose values are known
        self.num_tokens = len(self.tokens)  # with those promised
        self.num_computed = 0
        self.num_cached: int | None = (
            None  # computed tokens it found in the cache at its first start
        )
        self.blocks: list[int] = []
        self.digests: list[bytes] = []  # of full blocks of known tokens
        self.num_named = 0  # leading blocks whose names the pool has been told
        self.started = False
        self.group: BeamGroup | None = None
        self.moved = False  # whether the worker is still to be told of all its blocks

    @property
    def members(self) -> list[Sequence]:
        """What starts and ends with it: itself, or all beams of its group."""
        return [self] if self.group is None else self.group.members

    @property
    def pending(self) -> int:
        """Tokens still to be computed; 0 when all its tokens are promised."""
        return self.num_tokens - self.num_computed if self.num_tokens < self.limit else 0


class StepPlan:
    """What a step has given out so far.

    decoding: sequences that get one token, their last. counts: tokens of the others. blocks: those
    added. settled: False once blocks ran out; then none may be admitted.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.decoding: list[Sequence] = []
        self.counts: dict[Sequence, int] = {}
        self.blocks: dict[Sequence, list[int]] = {}
        self.settled = True

    def take(self, sequence: Sequence, count: int) -> None:
        """Give so many tokens to a sequence that lacks several."""
        self.counts[sequence] = count
        self.budget -= count
