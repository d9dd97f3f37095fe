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
from llmfw.engine.cuda_graphs import StepGraphs
from llmfw.engine.decode_step import BlockTableMirror, DecodeStep, Forward
from llmfw.engine.request_table import RequestTable
from llmfw.engine.step import StepInput

logger = logging.getLogger("llmfw.engine")


@dataclass(frozen=True)
class Replayed:
    """A step that was replayed.

    rows, positions: of each sequence, and where in it the new token stands (host).
    logits: [rows, vocab]. tokens: int64 [rows], the greedy ones, already in the table.
    """

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
    """

    def __init__(
        self,
        forward: Forward,
        config: ModelConfig[Any],
        table: RequestTable,
        caches: Mapping[int, LayerCache],
        num_groups: int,
        num_blocks: int,
    ) -> None:
        self._table = table
        rows, width = table.tokens.shape[0], table.blocks.shape[1]
        self._mirror = BlockTableMirror(rows, width, table.tokens.device)
        self._mirror.blocks[table.padding_row] = num_blocks
        shared: dict[str, Any] = {
            "flat_tokens": table.flat_tokens,
            "max_model_len": table.max_model_len,
            "blocks": self._mirror.blocks,
            "block_size": table.block_size,
            "caches": caches,
            "num_groups": num_groups,
            "padding_row": table.padding_row,
            "ops": config.ops,
        }

        def make_decode(size: int, max_kv_len: int) -> DecodeStep:
            return DecodeStep(
                forward, size=size, max_kv_len=max_kv_len, dtype=config.dtype, **shared
            )

        def make_context(length: int) -> ContextStep:
            return ContextStep(forward, length=length, **shared)

        self._graphs = StepGraphs(make_decode, make_context, table.padding_row, table.max_model_len)

    def run(self, step: StepInput) -> Replayed | None:
        """Replay the step if graphs serve it; call it for each step, to keep the tables current."""
        chunks, row_of = step.chunks, self._table.row_of
        self._mirror.apply(chunks, row_of)
        if not all(chunk.samples for chunk in chunks) or self._wants_prompt(step):
            return None
        if step.num_generations == len(chunks):
            rows = np.array([row_of[chunk.seq_id] for chunk in chunks])
            starts = np.array([chunk.start for chunk in chunks])
            output = self._graphs.decode(rows, starts)
            count = len(rows)
            return Replayed(rows, starts + 1, output.logits[:count], output.tokens[:count])
        longest = self._graphs.lengths[-1] if self._graphs.lengths else 0
        if len(chunks) == 1 and chunks[0].start == 0 and chunks[0].num_tokens <= longest:
            row, count = row_of[chunks[0].seq_id], chunks[0].num_tokens
            output = self._graphs.context(row, count)
            return Replayed(np.array([row]), np.array([count]), output.logits, output.tokens)
        return None

    def _wants_prompt(self, step: StepInput) -> bool:
        wanted, row_of = self._table.prompt_rows, self._table.row_of
        return any(wanted[row_of[chunk.seq_id]] for chunk in step.chunks)
