from __future__ import annotations

import pickle
from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfw.engine.scheduler import Scheduler, SchedulerConfig
from llmfw.engine.sequence import Sequence
from llmfw.engine.step import NewRequest, StepInput
from llmfw.errors import RequestError
from llmfw.sampling_params import SamplingParams

SAMPLING = SamplingParams(temperature=0).resolved()


def scheduler(**changes) -> Scheduler:
    limits = {
        "num_blocks": 16, "block_size": 4, "max_model_len": 64, "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
    }  # fmt: skip
    return Scheduler(SchedulerConfig(**{**limits, **changes}))


def sequence(seq_id: int, prompt, max_tokens: int = 4, **options) -> Sequence:
    tokens = tuple(prompt) if not isinstance(prompt, int) else tuple(range(seq_id, seq_id + prompt))
    return Sequence(NewRequest(seq_id, tokens, SAMPLING), len(tokens) + max_tokens, **options)


def shape(step: StepInput) -> list[tuple[int, int, int, bool]]:
    return [(c.seq_id, c.start, c.num_tokens, c.samples) for c in step.chunks]


def finish_step(made: Scheduler, step: StepInput) -> None:
    for chunk in step.chunks:
        if chunk.samples:
            made.receive(chunk.seq_id, 1)


def test_whole_prompt_then_one_token_a_step():
    made = scheduler()
    made.add(sequence(1, 5))
    first = made.schedule()
    assert shape(first) == [(1, 0, 5, True)]
    assert first.chunks[0].restart
    assert len(first.chunks[0].blocks) == 2
    assert [new.seq_id for new in first.new] == [1]
    finish_step(made, first)
    second = made.schedule()
    assert shape(second) == [(1, 5, 1, True)]
    assert not second.new
    assert not second.chunks[0].blocks
    assert second.num_generations == 1


def test_long_prompt_comes_in_chunks_and_decodes_go_first_in_budget():
    made = scheduler(max_num_batched_tokens=6)
    made.add(sequence(1, 3))
    finish_step(made, made.schedule())
    made.add(sequence(2, 12))
    step = made.schedule()
    assert shape(step) == [(2, 0, 5, False), (1, 3, 1, True)]  # context first in the batch
    assert step.num_generations == 1
    assert step.num_tokens == 6
    finish_step(made, step)
    assert shape(made.schedule()) == [(2, 5, 5, False), (1, 4, 1, True)]


def test_without_chunked_prefill_a_prompt_waits_for_its_budget():
    made = scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False)
    made.add(sequence(1, 6))
    made.add(sequence(2, 6))
    assert shape(made.schedule()) == [(1, 0, 6, True)]
    made.receive(1, 1)
    assert shape(made.schedule()) == [(2, 0, 6, True), (1, 6, 1, True)]
    with pytest.raises(RequestError, match="9 tokens, a step at most 8"):
        made.add(sequence(3, 9))


@pytest.mark.parametrize(("changes", "fits"), [({}, 63), ({"num_blocks": 5}, 19)])
def test_too_long_is_refused(changes, fits):
    made = scheduler(**changes)
    with pytest.raises(RequestError, match=f"at most {fits} fit") as caught:
        made.add(sequence(1, fits + 1))
    assert "kv_cache_memory" in caught.value.hint
    assert not made.has_work
    made.add(sequence(1, fits))
    with pytest.raises(RequestError, match="empty"):
        made.add(sequence(2, 0))


def test_steps_can_be_made_before_tokens_are_known():
    made = scheduler()
    made.add(sequence(1, 4, max_tokens=3))
    steps = [made.schedule() for _ in range(4)]
    assert [shape(step) for step in steps[:3]] == [
        [(1, 0, 4, True)],
        [(1, 4, 1, True)],
        [(1, 5, 1, True)],
    ]
    assert steps[3] is None  # all three tokens are promised
    made.finish(1)
    assert made.pool.num_used == 0


def test_prefix_is_shared_and_counted():
    made = scheduler()
    prompt = list(range(10))
    made.add(sequence(1, prompt))
    finish_step(made, made.schedule())
    made.add(sequence(2, prompt))
    step = made.schedule()
    assert shape(step)[0] == (2, 8, 2, True)
    assert made.running[2].blocks[:2] == made.running[1].blocks[:2]
    assert made.running[2].blocks[2] != made.running[1].blocks[2]
    assert (made.stats.prefix_queries, made.stats.prefix_hits) == (20, 8)
    made.check()


def test_equal_prompts_of_one_step_share_too():
    made = scheduler()
    for seq_id in (1, 2, 3):
        made.add(sequence(seq_id, list(range(9))))
    assert shape(made.schedule()) == [(1, 0, 9, True), (2, 8, 1, True), (3, 8, 1, True)]
    made.check()


def test_a_whole_prompt_in_the_cache_still_computes_its_last_block():
    made = scheduler()
    made.add(sequence(1, list(range(8))))
    finish_step(made, made.schedule())
    made.finish(1)
    made.add(sequence(2, list(range(8))))
    assert shape(made.schedule()) == [(2, 4, 4, True)]


def test_generated_blocks_are_shared_as_well():
    made = scheduler()
    made.add(sequence(1, list(range(4)), max_tokens=6))
    for token in (7, 8, 9, 10, 11):
        made.schedule()
        made.receive(1, token)
    made.finish(1)
    made.add(sequence(2, [0, 1, 2, 3, 7, 8, 9, 10, 5]))
    assert shape(made.schedule()) == [(2, 8, 1, True)]


def test_what_single_tokens_fill_is_shared_from_the_next_step_on():
    """A step of single tokens, which may be one kernel a layer, reads nothing that it writes."""
    made = scheduler()
    made.add(sequence(1, [5, 6, 7]))
    finish_step(made, made.schedule())
    made.add(sequence(2, [5, 6, 7, 1, 9]))  # its first block is what the first one fills now
    step = made.schedule()
    assert shape(step) == [(2, 0, 5, True), (1, 3, 1, True)]
    finish_step(made, step)
    made.add(sequence(3, [5, 6, 7, 1, 9]))
    assert shape(made.schedule())[-1] == (3, 4, 1, True)


def test_a_block_that_the_last_token_fills_is_shared_when_its_sequence_is_gone():
    made = scheduler()
    made.add(sequence(1, [5, 6, 7], max_tokens=2))
    for _ in range(2):
        finish_step(made, made.schedule())
    made.finish(1)
    made.add(sequence(2, [5, 6, 7, 1, 9]))
    assert shape(made.schedule()) == [(2, 4, 1, True)]


def test_no_hit_where_the_whole_prompt_must_be_computed():
    made = scheduler()
    made.add(sequence(1, list(range(9))))
    finish_step(made, made.schedule())
    made.add(sequence(2, list(range(9)), most_cached=0))
    assert shape(made.schedule())[0] == (2, 0, 9, True)


def test_the_latest_is_preempted_and_comes_back_first():
    made = scheduler(num_blocks=6, max_model_len=24, enable_prefix_caching=False)
    made.add(sequence(1, 8, max_tokens=16))
    made.add(sequence(2, 7, max_tokens=16))
    finish_step(made, made.schedule())  # 2 + 2 blocks
    made.add(sequence(3, 4))
    preempted = None
    for _ in range(16):
        step = made.schedule()
        finish_step(made, step)
        made.check()
        if made.stats.preemptions:
            preempted = step
            break
    assert preempted is not None
    assert [chunk.seq_id for chunk in preempted.chunks] == [1]
    assert made.waiting[0].seq_id == 2
    made.finish(1)
    again = made.schedule()
    assert again.chunks[0].seq_id == 2
    assert (again.chunks[0].start, again.chunks[0].restart) == (0, True)
    assert 2 not in [new.seq_id for new in again.new]  # the worker still knows it
    assert again.finished == (1,)


def test_finished_and_aborted_are_told_once_and_waiting_ones_never():
    made = scheduler(max_num_seqs=1)
    made.add(sequence(1, 4))
    made.add(sequence(2, 4))
    finish_step(made, made.schedule())
    made.finish(2)
    made.finish(1)
    made.finish(1)
    made.add(sequence(3, 4))
    assert made.schedule().finished == (1,)
    made.finish(3)
    assert not made.has_work
    assert made.pool.num_used == 0


def test_step_is_small_and_picklable():
    made = scheduler()
    made.add(sequence(1, 4))
    finish_step(made, made.schedule())
    step = made.schedule()
    assert pickle.loads(pickle.dumps(step)) == step
    assert len(pickle.dumps(step)) < 300


class Worker:
    """Checks what a worker sees: positions without gaps, tables that hold them, no foreign slot."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.size = config.block_size
        self.known: dict[int, int] = {}  # sequence -> tokens it has
        self.tables: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.holds: dict[tuple[int, int], tuple] = {}  # slot -> prefix it belongs to
        self.texts: dict[int, list[int]] = {}

    def run(self, step: StepInput) -> list[tuple[int, int]]:
        for seq_id in step.finished:
            del self.texts[seq_id]
        for new in step.new:
            self.texts[new.seq_id] = list(new.prompt_token_ids)
        sampled = []
        # In a step of single tokens the writes of one request may come after another's reads.
        alone = step.num_generations == len(step.chunks)
        older = dict(self.holds) if alone else self.holds
        for chunk in step.chunks:
            text = self.texts[chunk.seq_id]
            assert chunk.start + chunk.num_tokens <= len(text)
            if chunk.restart:
                self.tables[chunk.seq_id] = []
                self.computed[chunk.seq_id] = chunk.start
            table = self.tables[chunk.seq_id]
            table += chunk.blocks
            assert chunk.start == self.computed[chunk.seq_id]
            end = self.computed[chunk.seq_id] = chunk.start + chunk.num_tokens
            assert end <= len(table) * self.size
            for position in range(chunk.start, end):
                self.holds[table[position // self.size], position % self.size] = tuple(
                    text[: position + 1]
                )
        for chunk in step.chunks:  # after all writes, as layers do
            text, table = self.texts[chunk.seq_id], self.tables[chunk.seq_id]
            for position in range(chunk.start + chunk.num_tokens):
                slot = table[position // self.size], position % self.size
                holds = older if position < chunk.start else self.holds
                assert holds[slot] == tuple(text[: position + 1]), "reads another's cache"
            assert chunk.samples == (chunk.start + chunk.num_tokens == len(text))
            if chunk.samples:
                token = (sum(text) * 7 + len(text)) % 3
                text.append(token)
                sampled.append((chunk.seq_id, token))
        return sampled


@settings(max_examples=300, deadline=None)
@given(
    config=st.builds(
        SchedulerConfig,
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        max_model_len=st.integers(4, 40),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(2, 24),
        enable_prefix_caching=st.booleans(),
        enable_chunked_prefill=st.booleans(),
    ),
    depth=st.integers(0, 2),
    count=st.integers(1, 9),
    seed=st.integers(0, 1 << 32),
)
def test_everything_finishes_nothing_leaks_nothing_is_shared_wrongly(config, depth, count, seed):
    random = Random(seed)
    made = Scheduler(config)
    worker = Worker(config)
    longest = min(config.max_model_len, made.capacity) - 1
    if not config.enable_chunked_prefill:
        longest = min(longest, config.max_num_batched_tokens)
    waiting = deque(
        sequence(
            seq_id,
            [random.randrange(2) for _ in range(random.randint(1, longest))],
            max_tokens=random.randint(1, 12),
            most_cached=None if random.random() < 0.8 else random.randrange(9),
        )
        for seq_id in range(1, count + 1)
    )
    left = {each.seq_id: each for each in waiting}
    made_tokens: dict[int, int] = dict.fromkeys(left, 0)
    in_flight: deque[list[tuple[int, int]]] = deque()
    for _ in range(3000):
        if waiting and random.random() < 0.5:
            made.add(waiting.popleft())
        if left and random.random() < 0.04:
            victim = random.choice(sorted(left))
            if left[victim] not in waiting:
                made.finish(victim)
                del left[victim]
        step = made.schedule()
        made.check()
        if step is not None:
            assert 0 < step.num_tokens <= config.max_num_batched_tokens
            assert len(made.running) <= config.max_num_seqs
            assert len(worker.texts) + len(step.new) - len(step.finished) <= config.max_num_seqs
            lens = [chunk.num_tokens for chunk in step.chunks]
            contexts = len(lens) - step.num_generations
            assert all(n > 1 for n in lens[:contexts])
            assert all(n == 1 for n in lens[contexts:])
            in_flight.append(worker.run(step))
        elif not in_flight and not waiting:
            assert not left, "stuck"
            break
        if in_flight and (step is None or len(in_flight) > depth):
            for seq_id, token in in_flight.popleft():
                if seq_id not in left:
                    continue
                made.receive(seq_id, token)
                made_tokens[seq_id] += 1
                each = left[seq_id]
                if len(each.tokens) == each.limit or random.random() < 0.03:
                    made.finish(seq_id)
                    del left[seq_id]
        made.check()
    assert not left
    assert not made.has_work
    assert made.pool.num_used == 0
