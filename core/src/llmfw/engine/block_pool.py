"""The KV cache's blocks: who holds them, and which hold a prefix that another request can read.

Only numbers of blocks live here, no memory. A full block is named by a digest of its tokens chained
with the digest of the block before it, so equal digests mean equal whole prefixes. A block whose
last holder lets go keeps its digest and waits, least recently used first, to be read again or taken
for new tokens (as in vLLM's prefix cache).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

ROOT = b""


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of one full block's tokens after the prefix named by `parent`."""
    return blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Hands out, shares and takes back the blocks 0 .. num_blocks - 1.

    Args:
        num_blocks: Blocks of the cache.
        enable_prefix_caching: Whether blocks are remembered by digest.
    """

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._holders = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # named blocks that nobody holds, oldest first
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._unused) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of digests; they are not yet held."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: holding them makes so many fewer free."""
        return sum(1 for block in blocks if self._holders[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Share blocks that `match` found."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for new tokens; names of idle ones are forgotten, oldest first."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._unused:
                block = self._unused.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def name(self, block: int, digest: bytes) -> None:
        """Remember that a held, full block holds the prefix `digest`; the first one counts."""
        if (
            self.enable_prefix_caching
            and digest not in self._block_of
            and block not in self._digest_of
        ):
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in order; its last ones are taken again first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._unused.append(block)

    def forget(self) -> None:
        """Forget all names, so that nothing is shared any more."""
        self._unused.extend(self._idle)
        self._idle.clear()
        self._digest_of.clear()
        self._block_of.clear()

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the pool is consistent with the blocks that requests say they hold."""
        holders = [0] * self.num_blocks
        for blocks in held:
            assert len(set(blocks)) == len(blocks), "a request holds a block twice"
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "holders miscounted"
        free = [*self._unused, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b, n in enumerate(holders) if n == 0}, "a block leaked"
        assert set(self._idle) <= set(self._digest_of), "an idle block has no name"
        assert not set(self._unused) & set(self._digest_of), "an unused block has a name"
        assert self._block_of == {digest: block for block, digest in self._digest_of.items()}
