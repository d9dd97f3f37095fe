"""One decode step as a fixed computation on the device: what CUDA graphs capture and replay.

Everything that a step of generation requests needs follows from each request's row in the table and
the position of its last token: its token, its slot in the cache, its length, where its next token
goes. So a step uploads two numbers a request, where they do not follow from the step before, and
all shapes depend only on the padded batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmfw.attention.metadata import AttentionMetadata, CacheGroupView, LayerCache
from llmfw.engine.batch import upload
from llmfw.engine.step import Chunk
from llmfw.ops import DeviceInfo, OpTable

Forward = Callable[[AttentionMetadata, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockTableMirror:
    """The block tables of all rows on the device, kept current by small updates.

    Args:
        num_rows: Rows of the request table, the padding row included.
        max_blocks: Blocks of the longest sequence.
        device: Where it lives.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.blocks = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self._filled = np.zeros(num_rows, dtype=np.int64)
        self._device = device

    def apply(self, chunks: Sequence[Chunk], row_of: Mapping[int, int]) -> None:
        """Note the blocks that chunks bring, in one copy; nothing waits for the device."""
        places: list[int] = []
        values: list[int] = []
        width = self.blocks.shape[1]
        for chunk in chunks:
            row = row_of[chunk.seq_id]
            start = 0 if chunk.restart else int(self._filled[row])
            end = start + len(chunk.blocks)
            self._filled[row] = end
            places += range(row * width + start, row * width + end)
            values += chunk.blocks
        if not places:
            return
        flat = self.blocks.view(-1)
        if len(chunks) == 1:
            staged = torch.empty(len(values), dtype=torch.int32, pin_memory=flat.is_cuda)
            staged.numpy()[:] = values
            flat[places[0] : places[-1] + 1].copy_(staged, non_blocking=True)
            return
        where, what = upload([np.array(places), np.array(values)], torch.int64, self._device)
        flat.index_copy_(0, where, what.int())


@dataclass(frozen=True)
class DecodeOutput:
    """What a step leaves on the device: logits [rows, vocab] and greedy tokens int64 [rows]."""

    logits: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What all steps of a worker read and write on the device, whatever their size.

    Args:
        flat_tokens: int32 [rows * max_model_len], the token values of all rows (device).
        max_model_len: Tokens that a row has room for.
        blocks: int32 [rows, max_blocks], the rows' block tables (device).
        block_size: Tokens of a cache block.
        caches: K and V by layer index.
        num_groups: Groups of layers that share the block table.
        padding_row: A row that no request has; its block is one that no request has.
        states: Recurrent state by layer index; a sequence's slot is its row.
    """

    flat_tokens: torch.Tensor
    max_model_len: int
    blocks: torch.Tensor
    block_size: int
    caches: Mapping[int, LayerCache]
    num_groups: int
    padding_row: int
    states: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def first_blocks(self, tokens: int) -> torch.Tensor:
        """The part of the block tables that so many tokens of each row take."""
        return self.blocks[:, : -(-tokens // self.block_size)]

    def groups(self, tables: torch.Tensor, slots: torch.Tensor) -> tuple[CacheGroupView, ...]:
        """A step's view of the cache, for every group."""
        return (CacheGroupView(tables, slots, self.block_size),) * self.num_groups


class DecodeStep:
    """Computes one token of `size` generation requests; the same kernels and addresses every time.

    Args:
        forward: The model.
        memory: What it reads and writes.
        size: Requests of the padded batch.
        max_kv_len: No request of the step is longer.
        ops: Finds the kernels that run before and after the model; the references when left out.
        dtype: The model's.
    """

    def __init__(
        self,
        forward: Forward,
        memory: Memory,
        *,
        size: int,
        max_kv_len: int,
        ops: OpTable | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = memory.flat_tokens.device
        self._forward = forward
        self._memory = memory
        self._ops = ops or OpTable(DeviceInfo(device, frozenset()))
        self._prepare = self._ops.resolve("prepare_decode", dtype)
        self._blocks = memory.first_blocks(max_kv_len)
        self.size = size
        self.max_kv_len = max_kv_len
        self._cu_query_lens = torch.arange(size + 1, dtype=torch.int32, device=device)
        # Of each request its row, its position and how far it goes on in a step: 0 for padding.
        self.inputs = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.inputs[0].fill_(memory.padding_row)
        self._rows = self._positions = np.empty(0, dtype=np.int64)  # as the inputs are now

    def stage(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Bring the step's rows and positions, padded; nothing waits for the device.

        Where they follow from the step that `compute` did last, they are there already.
        """
        count = len(rows)
        if not (np.array_equal(rows, self._rows) and np.array_equal(positions, self._positions)):
            host = torch.empty(3, self.size, dtype=torch.int64, pin_memory=self.inputs.is_cuda)
            array = host.numpy()
            array[:, count:] = [[self._memory.padding_row], [0], [0]]
            array[0, :count] = rows
            array[1, :count] = positions
            array[2, :count] = 1
            self.inputs.copy_(host, non_blocking=True)
        self._rows, self._positions = rows, positions + 1

    def compute(self) -> DecodeOutput:
        """Run the model over the staged requests and put each greedy token in its place.

        The staged positions go on by one.
        """
        memory = self._memory
        rows = self.inputs[0]
        input_ids, positions, targets, slots, kv_lens, tables = self._prepare(
            *self.inputs.unbind(),
            memory.flat_tokens,
            self._blocks,
            memory.max_model_len,
            memory.block_size,
        )
        metadata = AttentionMetadata(
            query_lens=(1,) * self.size,
            kv_lens=(self.max_kv_len,) * self.size,
            num_contexts=0,
            cu_query_lens=self._cu_query_lens,
            kv_lens_device=kv_lens,
            positions=positions,
            groups=memory.groups(tables, slots),
            caches=memory.caches,
            max_query_len=1,
            max_kv_len=self.max_kv_len,
            states=memory.states,
            state_slots=rows if memory.states else None,
        )
        logits = self._forward(metadata, input_ids, positions)
        argmax = self._ops.resolve("argmax", logits.dtype, vocab_size=logits.shape[-1])
        tokens = argmax(logits, memory.flat_tokens, targets)
        return DecodeOutput(logits, tokens)
