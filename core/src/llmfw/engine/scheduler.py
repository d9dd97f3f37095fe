"""Which tokens of which sequences the next step computes. Pure Python, no tensors.

There is no separate prefill and decode: every sequence has tokens and computed tokens, and a step
takes some of the difference, within a budget. A sequence whose chunk reaches its last token is
promised one more, whose value may come
later: the scheduler goes on with counts, so step n + 1 can be made before step n's tokens are
known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llmfw.engine.beam_group import BeamGroup, Moves, longest_beams
from llmfw.engine.block_pool import ROOT, BlockPool, chain
from llmfw.engine.sequence import Sequence, StepPlan
from llmfw.engine.step import Chunk, Fork, NewRequest, StepInput
from llmfw.errors import RequestError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and switches.

    Args:
        num_blocks, block_size: The cache: blocks, and tokens a block; no blocks for a model that
            keeps nothing for each token.
        max_model_len: Most tokens of a sequence, prompt and output.
        max_num_seqs: Most sequences in flight.
        max_num_batched_tokens: Most tokens of a step.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True


@dataclass
class SchedulerStats:
    """Counters since the start."""

    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found


class Scheduler:
    """First come, first served, with preemption by recomputing.

    Decoding sequences get budget first, then started prompts, then new ones. When blocks run out
    the latest sequence gives up its blocks and starts again later from the head of the queue.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, enable_prefix_caching=config.enable_prefix_caching)
        self.stats = SchedulerStats()
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by order of arrival
        self._sequences: dict[int, Sequence] = {}
        self._finished: list[int] = []  # to be told to the worker
        self._forks: list[Fork] = []  # to be told to the worker
        self._step_id = 0
        self._naming = config.enable_prefix_caching

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds; those of all sequences where they take no blocks."""
        config = self.config
        if not config.num_blocks:
            return config.max_num_seqs * config.max_model_len
        return config.num_blocks * config.block_size

    @property
    def has_work(self) -> bool:
        """Whether some sequence is not finished."""
        return bool(self._sequences)

    @property
    def longest(self) -> int:
        """Most tokens of a sequence: the model's limit or the whole cache."""
        return min(self.config.max_model_len, self.capacity)

    def check_length(self, prompt_len: int) -> None:
        """Refuse a prompt that does not fit even with the cache to itself; any thread may ask.

        Raises:
            RequestError: If it is empty or too long.
        """
        if prompt_len < 1:
            raise RequestError("the prompt is empty", hint="give at least one token")
        if prompt_len >= self.longest:
            raise RequestError(
                f"the prompt has {prompt_len} tokens; with one to generate, at most "
                f"{self.longest - 1} fit",
                hint="shorten the prompt, or raise max_model_len or kv_cache_memory",
            )
        budget = self.config.max_num_batched_tokens
        if not self.config.enable_chunked_prefill and prompt_len > budget:
            raise RequestError(
                f"the prompt has {prompt_len} tokens, a step at most {budget}",
                hint="turn chunked prefill on, or raise max_num_batched_tokens",
            )

    def longest_beams(self, num_beams: int, prompt_len: int) -> int:
        """Most tokens, prompt and output, of beams that search together; any thread may ask.

        Raises:
            RequestError: If so many cannot be in flight, or the cache holds none of their tokens.
        """
        config = self.config
        if num_beams > config.max_num_seqs:
            raise RequestError(
                f"num_beams is {num_beams}, at most {config.max_num_seqs} sequences are in flight",
                hint="lower num_beams or raise max_num_seqs",
            )
        if not config.num_blocks:
            return config.max_model_len
        longest = longest_beams(num_beams, prompt_len, config.num_blocks, config.block_size)
        if longest <= prompt_len:
            raise RequestError(
                f"the cache holds no {num_beams} beams after {prompt_len} tokens of prompt",
                hint="shorten the prompt, lower num_beams, or raise kv_cache_memory",
            )
        return min(longest, config.max_model_len)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: As `check_length`.
        """
        self.check_length(len(sequence.tokens))
        sequence.limit = min(sequence.limit, self.longest)
        self._extend_digests(sequence)
        self._sequences[sequence.seq_id] = sequence
        self.waiting.append(sequence)

    def add_beams(self, members: list[Sequence]) -> None:
        """Queue the sequences of a beam search; the first computes the prompt for all.

        Raises:
            RequestError: As `check_length` and `longest_beams`.
        """
        lead = members[0]
        longest = self.longest_beams(len(members), len(lead.tokens))
        for member in members:
            member.limit = min(member.limit, longest)
            member.num_computed = member.num_tokens
        lead.num_computed = 0
        self.add(lead)
        size = self.config.block_size if self.config.num_blocks else None
        group = BeamGroup(members, size)
        for member in members:
            member.group = group

    def fork(self, moves: Moves) -> None:
        """Let the beams of a search that is under way go on, each with one more token."""
        sequence = self.running[moves[0].seq_id]
        assert sequence.group is not None
        self._forks += sequence.group.fork(moves)

    def receive(self, seq_id: int, token: int) -> None:
        """Learn the value of a promised token; of a finished sequence it is ignored."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            tokens = sequence.tokens
            tokens.append(token)
            if self._naming and len(tokens) % self.config.block_size == 0:
                self._extend_digests(sequence)

    def finish(self, seq_id: int) -> None:
        """Forget a sequence and free its blocks; a step in flight may still compute it."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is None:
            return
        if seq_id not in self.running:
            self.waiting.remove(sequence)
        self._free(sequence)
        ended = [member.seq_id for member in sequence.members]
        for each in ended:
            self.running.pop(each, None)
        if sequence.started:
            self._finished += ended
        if sequence.group is not None:
            self._forks = [fork for fork in self._forks if fork.seq_id not in ended]

    def schedule(self) -> StepInput | None:
        """The next step, or None when nothing can be computed now."""
        plan = StepPlan(self.config.max_num_batched_tokens)
        prefilling = self._plan_decoding(plan)
        self._plan_prefilling(plan, prefilling)
        generations = [self._generate(sequence, plan) for sequence in plan.decoding]
        contexts: list[Chunk] = []
        new: list[NewRequest] = []
        for sequence, count in plan.counts.items():
            chunk = self._advance(sequence, count, plan.blocks.get(sequence, ()), restart=False)
            (generations if count == 1 else contexts).append(chunk)
        if plan.settled:
            self._admit(plan, generations, contexts, new)
        if not generations and not contexts:
            return None
        self._step_id += 1
        finished, self._finished = tuple(self._finished), []
        forks, self._forks = tuple(self._forks), []
        return StepInput(
            self._step_id, (*contexts, *generations), len(generations), tuple(new), finished, forks
        )

    def check(self) -> None:
        """Assert that no block is lost or wrongly shared; costs time in proportion to the cache."""
        self.pool.check([self._held(sequence) for sequence in self._sequences.values()])
        assert all(not sequence.blocks for sequence in self.waiting)

    def _plan_decoding(self, plan: StepPlan) -> list[Sequence]:
        """Give a token each to sequences that lack one; those that lack more are returned."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            pending = sequence.num_tokens - sequence.num_computed
            if pending and sequence.num_tokens < sequence.limit:
                (decoding if pending == 1 else prefilling).append(sequence)
        del decoding[plan.budget :]
        size = self.config.block_size
        # Only at the start of a block can one be missing.
        starved = {
            sequence
            for sequence in decoding
            if not sequence.num_computed % size and not self._find_blocks(sequence, 1, plan)
        }
        if not plan.settled:
            running = self.running
            decoding = [
                sequence
                for sequence in decoding
                if sequence.seq_id in running and sequence not in starved
            ]
        plan.decoding = decoding
        plan.budget -= len(decoding)
        return prefilling

    def _plan_prefilling(self, plan: StepPlan, prefilling: list[Sequence]) -> None:
        """Give what is left of the budget to sequences that lack several tokens."""
        for sequence in prefilling:
            count = min(sequence.pending, plan.budget)
            if count and self._find_blocks(sequence, count, plan):
                plan.take(sequence, count)

    def _find_blocks(self, sequence: Sequence, count: int, plan: StepPlan) -> bool:
        """Give a running sequence the blocks that it lacks; False if it has to wait for them."""
        if sequence.seq_id not in self.running:
            return False  # preempted by one before it
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        if missing > 0:
            if missing > self.pool.num_free:
                plan.settled = False
                if not self._preempt_for(sequence, missing, plan):
                    return False
            plan.blocks[sequence] = self.pool.allocate(missing)
            sequence.blocks += plan.blocks[sequence]
        return True

    def _admit(
        self, plan: StepPlan, generations: list[Chunk], contexts: list[Chunk], new: list[NewRequest]
    ) -> None:
        """Start waiting sequences while budget, places and blocks last."""
        while self.waiting and plan.budget:
            sequence = self.waiting[0]
            if len(self.running) + len(sequence.members) > self.config.max_num_seqs:
                return
            shared = self._shared_prefix(sequence)
            cached = len(shared) * self.config.block_size
            remaining = sequence.num_tokens - cached
            count = min(remaining, plan.budget)
            if count < remaining and not self._may_split(remaining):
                return
            group = sequence.group
            needed = self._blocks_for(cached + count) if group is None else group.num_blocks
            fresh = needed - len(shared)
            # One block for each running sequence stays free, lest it be preempted at once.
            if (
                fresh
                and fresh + len(self.running) > self.pool.num_free - self.pool.count_idle(shared)
                and self.running
            ):
                return
            self.waiting.popleft()
            self.running.update((member.seq_id, member) for member in sequence.members)
            self.pool.hold(shared)
            sequence.blocks = shared + self.pool.allocate(fresh)
            if group is not None:
                group.seat(sequence.blocks)
            sequence.num_computed = cached
            sequence.num_named = len(shared)
            if not sequence.started:
                sequence.started = True
                new += [member.new for member in sequence.members]
                self._count_prefix(sequence, cached)
            plan.take(sequence, count)
            # Named at once: a later one of this step may share it, for layers write K and V before
            # they read where a step has more than single tokens.
            chunk = self._advance(sequence, count, sequence.blocks, restart=True)
            (generations if count == 1 else contexts).append(chunk)

    def _generate(self, sequence: Sequence, plan: StepPlan) -> Chunk:
        """The chunk of a sequence that lacks one token, which promises the next."""
        start = sequence.num_computed
        # Before this step's token counts: what single tokens fill is shared from the next step on,
        # so that no request of a step of them reads what another one writes.
        if sequence.num_named < len(sequence.digests):
            self._name_blocks(sequence)
        sequence.num_computed = start + 1
        if sequence.group is not None:
            return self._generate_beam(sequence, start)
        sequence.num_tokens += 1  # promised
        blocks = plan.blocks.get(sequence) if plan.blocks else None
        fields = (sequence.seq_id, start, 1, True, tuple(blocks) if blocks else (), False)
        return tuple.__new__(Chunk, fields)  # in half the time of Chunk(...)

    def _generate_beam(self, sequence: Sequence, start: int) -> Chunk:
        moved, sequence.moved = sequence.moved, False
        blocks = tuple(sequence.blocks) if moved else ()
        return Chunk(sequence.seq_id, start, 1, True, blocks, moved)

    def _advance(
        self, sequence: Sequence, count: int, blocks: list[int] | tuple[int, ...], *, restart: bool
    ) -> Chunk:
        start = sequence.num_computed
        if count == 1:  # as `_generate` does
            self._name_blocks(sequence)
        sequence.num_computed += count
        samples = sequence.num_computed == sequence.num_tokens
        if samples and sequence.group is None:
            sequence.num_tokens += 1  # promised
        if count > 1:
            self._name_blocks(sequence)
        return Chunk(sequence.seq_id, start, count, samples, tuple(blocks), restart)

    def _name_blocks(self, sequence: Sequence) -> None:
        """Tell the pool of full blocks of known tokens."""
        full = min(sequence.num_computed // self.config.block_size, len(sequence.digests))
        for index in range(sequence.num_named, full):
            self.pool.name(sequence.blocks[index], sequence.digests[index])
        sequence.num_named = max(sequence.num_named, full)

    def _preempt_for(self, sequence: Sequence, missing: int, plan: StepPlan) -> bool:
        """Free blocks by preempting the latest sequences, never `sequence` or one before it."""
        victims = []
        for victim in reversed(self.running.values()):
            if victim is sequence:
                break
            if victim.pending and victim.group is None:
                victims.append(victim)
        for victim in victims:
            if missing <= self.pool.num_free:
                break
            # those planned before are earlier ones
            assert victim not in plan.counts
            assert victim not in plan.decoding
            del self.running[victim.seq_id]
            self._free(victim)
            self.waiting.appendleft(victim)
            self.stats.preemptions += 1
        return missing <= self.pool.num_free

    def _free(self, sequence: Sequence) -> None:
        if sequence.blocks and sequence.group is None:
            self._name_blocks(sequence)  # of its last step
        self.pool.release(self._held(sequence))
        sequence.blocks = []

    def _held(self, sequence: Sequence) -> list[int]:
        return sequence.blocks if sequence.group is None else sequence.group.blocks

    def _shared_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its prefix; at least one token stays to be computed, for its logits."""
        if not self.config.enable_prefix_caching:
            return []
        usable = sequence.num_tokens - 1
        if sequence.most_cached is not None:
            usable = min(usable, sequence.most_cached)
        usable //= self.config.block_size
        return self.pool.match(sequence.digests[:usable])

    def _count_prefix(self, sequence: Sequence, cached: int) -> None:
        sequence.num_cached = cached
        self.stats.prefix_queries += len(sequence.new.prompt_token_ids)
        self.stats.prefix_hits += cached

    def _extend_digests(self, sequence: Sequence) -> None:
        if not self.config.enable_prefix_caching:
            return
        size = self.config.block_size
        digests = sequence.digests
        for start in range(len(digests) * size, len(sequence.tokens) - size + 1, size):
            parent = digests[-1] if digests else ROOT
            digests.append(chain(parent, sequence.tokens[start : start + size]))

    def _may_split(self, tokens: int) -> bool:
        """Whether a sequence may start with a part of its tokens.

        Without chunked prefill only one that no step could hold: prompt and output of a preempted.
        """
        return self.config.enable_chunked_prefill or tokens > self.config.max_num_batched_tokens

    def _blocks_for(self, tokens: int) -> int:
        if not self.config.num_blocks:
            return 0
        return -(-tokens // self.config.block_size)
