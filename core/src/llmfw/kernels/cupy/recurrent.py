"""What launchers of recurrent layers share: the parts of a batch, and what inputs have to be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata


class Span(NamedTuple):
    """Neighbouring requests of a batch that one launch serves."""

    first: int
    requests: int
    first_token: int
    longest: int  # most tokens of one of them


def spans_of(metadata: AttentionMetadata) -> tuple[Span, ...]:
    """Context requests and generation requests, apart; those that are there."""
    count, contexts, lens = metadata.num_requests, metadata.num_contexts, metadata.query_lens
    if not 0 < contexts < count:
        return (Span(0, count, 0, metadata.max_query_len or max(lens)),)
    tokens = metadata.num_context_tokens
    return (
        Span(0, contexts, 0, max(lens[:contexts])),
        Span(contexts, count - contexts, tokens, max(lens[contexts:])),
    )


class Spans:
    """The spans of the last batch, so that the layers of one step find them once."""

    def __init__(self) -> None:
        self._batch: Callable[[], AttentionMetadata | None] = lambda: None
        self._spans: tuple[Span, ...] = ()

    def of(self, metadata: AttentionMetadata) -> tuple[Span, ...]:
        """The spans of this batch."""
        if self._batch() is not metadata:
            self._spans = spans_of(metadata)
            self._batch = weakref.ref(metadata)
        return self._spans


def slots_address(metadata: AttentionMetadata) -> int:
    """Where the batch's slots of state are."""
    slots = metadata.state_slots
    assert slots is not None, "the batch has no slots for recurrent state"
    return slots.data_ptr()


def in_rows(width: int, dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether they are rows of numbers side by side that begin at multiples of `width` numbers."""
    for x in tensors:
        step = 1
        for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        if x.dtype is not dtype or x.stride(0) % width or x.data_ptr() % (width * x.itemsize):
            return False
    return True


def whole(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether they are contiguous, and aligned to 16 bytes."""
    return all(x.dtype is dtype and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
