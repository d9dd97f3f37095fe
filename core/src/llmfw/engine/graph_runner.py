"""Which steps are replayed from CUDA graphs, and with what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmfw.attention.metadata import LayerCache
from llmfw.config import ModelConfig
from llmfw.engine.context_step import ContextStep
from llmfw.engine.cuda_graphs import StepGraphs, kv_limits
from llmfw.engine.decode_step import BlockTableMirror, DecodeStep, Forward, Memory
from llmfw.engine.request_table import RequestTable
from llmfw.engine.step import StepInput

logger = logging.getLogger("llmfw.engine")

_FEW = 128  # requests; docs/design/kernels-cupy.md has the measurements


@dataclass(frozen=True)
class Replayed:
    """A step that was replayed.

    seq_ids, rows, positions: the sequences, their rows, and where the new tokens stand (host).
    logits: [rows, vocab]. tokens: int64 [rows], the greedy ones, already in the table.
    """

    seq_ids: tuple[int, ...]
    rows: np.ndarray
    positions: np.ndarray
    logits: torch.Tensor
    tokens: torch.Tensor


class GraphRunner:
    """Captures the graphs of one worker and replays those steps that fit them.

    Args:
        forward: The model.
        config: What it was built from.
        table: The worker's sequences.
        caches: K and V by layer index, with one block more than the scheduler knows.
        num_groups: Groups of layers that share the block table.
        num_blocks: Blocks that the scheduler knows; the next one is for padding.
        states: Recurrent state by layer index, with one slot more for padding.
    """

    def __init__(
        self,
        forward: Forward,
        config: ModelConfig[Any],
        table: RequestTable,
        caches: Mapping[int, LayerCache],
        num_groups: int,
        num_blocks: int,
        states: Mapping[int, Mapping[str, torch.Tensor]],
    ) -> None:
        self._table = table
        rows, width = table.tokens.shape[0], table.blocks.shape[1]
        self._mirror = BlockTableMirror(rows, width, table.tokens.device)
        self._mirror.blocks[table.padding_row] = num_blocks
        memory = Memory(
            flat_tokens=table.flat_tokens,
            max_model_len=table.max_model_len,
            blocks=self._mirror.blocks,
            block_size=table.block_size,
            caches=caches,
            num_groups=num_groups,
            padding_row=table.padding_row,
            states=states,
        )
        ops, dtype = config.ops, config.dtype

        def make_decode(size: int, max_kv_len: int) -> DecodeStep:
            return DecodeStep(
                forward, memory, size=size, max_kv_len=max_kv_len, ops=ops, dtype=dtype
            )

        def make_context(length: int) -> ContextStep:
            return ContextStep(forward, memory, length=length, ops=ops)

        limits = kv_limits(table.max_model_len, bool(caches))
        self._graphs = StepGraphs(make_decode, make_context, table.padding_row, limits)

    def run(self, step: StepInput) -> Replayed | None:
        """Replay the step if graphs serve it; call it for each step, to keep the tables current."""
        table, count = self._table, len(step.chunks)
        self._mirror.apply(step.grown, table.row_of)
        generates = step.num_generations == count
        if not generates and count > 1:
            return None
        seq_ids, starts, lens, samples, *_ = zip(*step.chunks, strict=True)
        rows = table.rows_of(seq_ids)
        if not all(samples) or table.prompt_rows[rows].any():
            return None
        if generates:
            seq_ids, rows, positions = longest_first(seq_ids, rows, np.array(starts))
            output = self._graphs.decode(rows, positions)
            logits, tokens = output.logits[:count], output.tokens[:count]
            return Replayed(seq_ids, rows, positions + 1, logits, tokens)
        longest = self._graphs.lengths[-1] if self._graphs.lengths else 0
        if starts[0] or lens[0] > longest:
            return None
        output = self._graphs.context(int(rows[0]), lens[0])
        return Replayed(seq_ids, rows, np.array(lens), output.logits, output.tokens)


def longest_first(
    seq_ids: tuple[int, ...], rows: np.ndarray, positions: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The same sequences, those with the most tokens first unless they are many.

    A device takes up requests in their order: were a long one the last, most of it would wait. Of
    many requests the last one hardly counts, and short ones hide better among long ones.
    """
    if len(rows) > _FEW or (positions[1:] <= positions[:-1]).all():
        return seq_ids, rows, positions
    order = np.argsort(-positions, kind="stable")
    return tuple(seq_ids[index] for index in order), rows[order], positions[order]
