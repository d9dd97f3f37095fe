from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfw.engine.block_pool import ROOT, BlockPool, chain


def named(pool: BlockPool, count: int, start: int = 0) -> tuple[list[int], list[bytes]]:
    blocks = pool.allocate(count)
    digests = [bytes([start + i]) for i in range(count)]
    for block, digest in zip(blocks, digests, strict=True):
        pool.name(block, digest)
    return blocks, digests


def test_chain_depends_on_tokens_and_on_what_came_before():
    first = chain(ROOT, [1, 2])
    assert first == chain(ROOT, (1, 2))
    assert len({first, chain(ROOT, [2, 1]), chain(first, [1, 2]), chain(ROOT, [1])}) == 4


def test_released_blocks_are_found_again_and_held_once():
    pool = BlockPool(4)
    blocks, digests = named(pool, 3)
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.match([*digests, b"unknown"]) == blocks
    assert pool.match([b"unknown", *digests]) == []
    assert pool.count_idle(blocks) == 3
    pool.hold(blocks[:2])
    pool.hold(blocks[:2])
    assert pool.num_used == 2
    pool.check([blocks[:2], blocks[:2]])
    pool.release(blocks[:2])
    assert pool.num_used == 2


def test_least_recently_used_is_forgotten_first_and_unnamed_before_named():
    pool = BlockPool(4)
    old, old_digests = named(pool, 1)
    new, new_digests = named(pool, 2, start=10)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) not in (old, new[:1], new[1:])  # the one never used
    assert pool.allocate(1) == old
    assert pool.match(old_digests) == []
    assert pool.allocate(1) == new[1:]  # a prefix's end goes before its beginning
    assert pool.match(new_digests) == new[:1]


def test_first_block_of_a_name_keeps_it():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.name(first, b"x")
    pool.name(second, b"x")
    assert pool.match([b"x"]) == [first]
    pool.release([first, second])
    pool.check([])


def test_without_prefix_caching_nothing_is_remembered():
    pool = BlockPool(2, enable_prefix_caching=False)
    blocks, digests = named(pool, 2)
    pool.release(blocks)
    assert pool.match(digests) == []
    pool.check([])


def test_forget():
    pool = BlockPool(3)
    blocks, digests = named(pool, 2)
    pool.release(blocks[:1])
    pool.forget()
    assert pool.match(digests) == []
    pool.check([blocks[1:]])


def test_asking_for_too_many_is_a_fault():
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        BlockPool(2).allocate(3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("ahrn"), st.integers(0, 7)), max_size=60),
)
def test_never_leaks(size, actions):
    pool = BlockPool(size)
    held: list[list[int]] = []
    for action, number in actions:
        if action == "a" and number <= pool.num_free:
            held.append(pool.allocate(number))
        elif action == "r" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "n" and held:
            for block in held[number % len(held)]:
                pool.name(block, bytes([number]))
        elif action == "h":
            found = pool.match([bytes([number])])
            pool.hold(found)
            held.append(found)
        pool.check(held)
    for blocks in held:
        pool.release(blocks)
    pool.check([])
    assert pool.num_free == size
