"""Checksums of tensors: what they are, and what they notice."""

from __future__ import annotations

import pytest
import torch

from llmfw.weights.checksums import bytes_of, checksum, checksum_text, word_sum


def test_the_sum_of_little_endian_words() -> None:
    assert checksum(torch.tensor([1, 2, 3], dtype=torch.int64)) == f"{6:016x}"
    assert checksum(torch.tensor([-1, 2], dtype=torch.int64)) == f"{1:016x}"
    assert checksum(torch.tensor([1, 1], dtype=torch.uint8)) == f"{0x0101:016x}"
    assert checksum(torch.tensor(5, dtype=torch.int64)) == f"{5:016x}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.float8_e4m3fn])
def test_one_changed_byte_shows(dtype: torch.dtype) -> None:
    value = torch.randn(5, 7).to(dtype)
    before = checksum(value)
    for place in (0, 17, value.nbytes - 1):
        changed = value.clone()
        bytes_of(changed)[place] ^= 1
        assert checksum(changed) != before


def test_a_view_counts_as_its_values() -> None:
    value = torch.randn(6, 4)
    assert checksum(value.T) == checksum(value.T.contiguous())
    assert checksum(value[2:, 1:]) == checksum(value[2:, 1:].clone())


def test_sums_of_parts_add_up() -> None:
    value = torch.randn(6, 4, dtype=torch.float64)
    total = sum(word_sum(part) for part in value.split([1, 3, 2]))
    assert checksum_text(total) == checksum(value)
