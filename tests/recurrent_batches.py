"""Batches with slots for recurrent state, for tests of ops and kernels."""

from __future__ import annotations

import torch

from llmfw.attention.metadata import AttentionMetadata

SLOTS = 7
BATCHES = {
    "decode": ((1, 1, 1, 1), 0),
    "one prompt": ((150,), 1),
    "short prompts": ((2, 3, 2), 3),
    "pieces that come out even": ((64, 128), 2),
    "mixed": ((70, 5, 131, 1, 1), 3),
    "one token among contexts": ((1, 33), 2),
    "speculation": ((4, 1, 3), 0),
}


def batch(name: str) -> AttentionMetadata:
    lens, num_contexts = BATCHES[name]
    return AttentionMetadata(
        query_lens=lens,
        kv_lens=lens,
        num_contexts=num_contexts,
        cu_query_lens=torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32),
        kv_lens_device=torch.tensor(lens, dtype=torch.int32),
        positions=torch.zeros(sum(lens), dtype=torch.int64),
        groups=(),
        caches={},
        max_query_len=max(lens),
        max_kv_len=max(lens),
        state_slots=torch.randperm(SLOTS)[: len(lens)],
    )


def strided(*shape: int) -> torch.Tensor:
    """Slots as the engine's: parts of a wider buffer."""
    size = torch.Size(shape[1:]).numel()
    return torch.randn(shape[0], size + 8)[:, 4 : 4 + size].view(shape)
