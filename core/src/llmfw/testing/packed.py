"""A packed batch by hand: runs a model step by step with a paged cache and no scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from llmfw.attention import (
    AttentionMetadata,
    CacheGroupView,
    LayerCache,
    StateCache,
    get_attention_backend,
)
from llmfw.models import PretrainedModel
from llmfw.ops.device import as_current


class PackedSession:
    """Sequences with blocks and state of their own; `step` feeds some of them any number of tokens.

    Args:
        model: A built and loaded model.
        num_blocks: Blocks in the cache.
        block_size: Tokens in a block; the model's setting when left out.
        num_slots: Most sequences of a model that keeps recurrent state.
    """

    def __init__(
        self,
        model: PretrainedModel[Any],
        *,
        num_blocks: int = 64,
        block_size: int | None = None,
        num_slots: int = 16,
    ) -> None:
        config = model.model_config
        self.model = model
        self.device = config.device
        self.block_size = block_size or config.block_size
        backend = get_attention_backend(config.attn_backend)
        self.caches: dict[int, LayerCache] = {
            layer: backend.allocate(spec, num_blocks, self.block_size, self.device)
            for layer, spec in model.cache_specs().items()
        }
        states = model.state_specs()
        self.state = StateCache(states, num_slots if states else 0, self.device)
        self._slots: dict[str, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Run new tokens of some sequences in one packed batch.

        Args:
            tokens: New token ids by sequence; those with more than one come first in the batch.

        Returns:
            Logits of every new token by sequence: [new tokens, vocab].
        """
        order = sorted(tokens, key=lambda name: len(tokens[name]) == 1)
        query_lens = [len(tokens[name]) for name in order]
        past = [self._lengths.get(name, 0) for name in order]
        for name, count in zip(order, query_lens, strict=True):
            self._grow(name, count)
        ids = torch.tensor([token for name in order for token in tokens[name]], device=self.device)
        metadata = self._metadata(order, query_lens, past)
        with as_current(self.device), torch.inference_mode():
            logits = self.model(metadata, ids, metadata.positions)
        return dict(zip(order, logits.split(query_lens), strict=True))

    def _grow(self, name: str, count: int) -> None:
        length = self._lengths.get(name, 0) + count
        blocks = self._blocks.setdefault(name, [])
        self._slots.setdefault(name, len(self._slots))
        while len(blocks) * self.block_size < length:
            blocks.append(self._free.pop())
        self._lengths[name] = length

    def _metadata(
        self, order: Sequence[str], query_lens: Sequence[int], past: Sequence[int]
    ) -> AttentionMetadata:
        kv_lens = [start + count for start, count in zip(past, query_lens, strict=True)]
        width = max(len(self._blocks[name]) for name in order)
        tables = [self._blocks[name] + [0] * (width - len(self._blocks[name])) for name in order]
        spans = list(zip(order, past, kv_lens, strict=True))
        positions = [p for _, start, end in spans for p in range(start, end)]
        slots = [
            self._blocks[name][p // self.block_size] * self.block_size + p % self.block_size
            for name, start, end in spans
            for p in range(start, end)
        ]

        def tensor(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        view = CacheGroupView(
            tensor(tables, torch.int32), tensor(slots, torch.int64), self.block_size
        )
        return AttentionMetadata(
            query_lens=tuple(query_lens),
            kv_lens=tuple(kv_lens),
            num_contexts=sum(count > 1 for count in query_lens),
            cu_query_lens=tensor([0, *accumulate(query_lens)], torch.int32),
            kv_lens_device=tensor(kv_lens, torch.int32),
            positions=tensor(positions, torch.int64),
            groups=(view,),
            caches=self.caches,
            max_query_len=max(query_lens),
            max_kv_len=max(kv_lens),
            states=self.state.layers,
            state_slots=tensor([self._slots[name] for name in order], torch.int64),
        )
