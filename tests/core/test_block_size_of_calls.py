"""A cache of other blocks than attention was built for is refused, with the cure."""

from __future__ import annotations

import pytest

from llmfw.errors import KernelError
from llmfw.kernels.cupy.paged_decode import check_block_size


def test_other_blocks_are_refused_with_the_cure() -> None:
    check_block_size(16, 16)
    with pytest.raises(KernelError, match="blocks of 16 tokens, called with 32") as caught:
        check_block_size(16, 32)
    assert "block_size" in str(caught.value.hint)
