"""Checksums of tensors, cheap enough to be looked at whenever one is read.

A tensor's checksum is the sum of its bytes taken as little-endian unsigned 64-bit words (the last
one filled up with zeros) modulo 2**64, as 16 hexadecimal digits. Any change within one word shows;
it guards against damage, not against malice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

WORD = 8  # bytes


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, uint8 [bytes]; a view where it lies on the CPU without gaps."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return np.asarray(flat.view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> str:
    """The checksum of a tensor's bytes."""
    return checksum_text(word_sum(tensor))


def word_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's words; those of its parts add up where parts are whole words."""
    data = bytes_of(tensor)
    whole = len(data) // WORD * WORD
    total = int(np.add.reduce(data[:whole].view("<u8"), dtype=np.uint64)) if whole else 0
    return total + int.from_bytes(data[whole:].tobytes(), "little")


def checksum_text(total: int) -> str:
    """A sum of words as a checksum."""
    return f"{total % 2**64:016x}"
