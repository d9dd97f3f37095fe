"""A short prompt's prefill as a fixed computation on the device: a quick first token.

Run eagerly, a short prompt costs more time for launching kernels than for running them. Padded to
a few lengths it is captured once, as decode steps are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmfw.attention.metadata import AttentionMetadata, CacheGroupView, LayerCache
from llmfw.engine.decode_step import DecodeOutput, Forward
from llmfw.ops.table import OpTable

LENGTHS = (16, 32, 64, 128, 256, 512)


class ContextStep:
    """Computes one whole prompt of at most `length` tokens and the token after it.

    Args:
        forward: The model.
        flat_tokens: int32 [rows * max_model_len], the token values of all rows (device).
        max_model_len: Tokens that a row has room for.
        blocks: int32 [rows, max_blocks], the rows' block tables (device).
        block_size: Tokens of a cache block.
        caches: K and V by layer index.
        num_groups: Groups of layers that share the block table.
        length: Tokens of the padded prompt.
        padding_row: A row that no request has; padded tokens write into its block.
        ops: Finds the kernel that chooses the token.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        flat_tokens: torch.Tensor,
        max_model_len: int,
        blocks: torch.Tensor,
        block_size: int,
        caches: Mapping[int, LayerCache],
        num_groups: int,
        length: int,
        padding_row: int,
        ops: OpTable,
    ) -> None:
        device = flat_tokens.device
        self._forward = forward
        self._ops = ops
        self._flat_tokens = flat_tokens
        self._max_model_len = max_model_len
        self._blocks = blocks[:, : -(-length // block_size)]
        self._block_size = block_size
        self._caches = caches
        self._num_groups = num_groups
        self._padding_row = padding_row
        self.length = length
        self._positions = torch.arange(length, device=device)
        self.inputs = torch.zeros(2, 1, dtype=torch.int64, device=device)  # row, tokens
        self.inputs[0].fill_(padding_row)
        self.inputs[1].fill_(1)

    def stage(self, row: int, count: int) -> None:
        """Upload the request's row and its number of tokens; nothing waits for the device."""
        host = torch.tensor([[row], [count]], pin_memory=self.inputs.is_cuda)
        self.inputs.copy_(host, non_blocking=True)

    def compute(self) -> DecodeOutput:
        """Run the model over the staged prompt and put the greedy token behind it."""
        row, count = self.inputs[0], self.inputs[1]  # [1] each
        positions = self._positions
        first = row * self._max_model_len
        input_ids = self._flat_tokens.index_select(0, first + positions).long()
        table = self._blocks.index_select(0, row)  # [1, blocks]
        block = table[0].index_select(0, positions // self._block_size).long()
        spare = self._blocks[self._padding_row, 0].long()
        block = torch.where(positions < count, block, spare)
        slots = block * self._block_size + positions % self._block_size
        view = CacheGroupView(table, slots, self._block_size)
        cumulative = torch.cat((torch.zeros_like(count), count)).int()
        metadata = AttentionMetadata(
            query_lens=(self.length,),
            kv_lens=(self.length,),
            num_contexts=0,  # attention reads the true lengths from the device
            cu_query_lens=cumulative,
            kv_lens_device=count.int(),
            positions=positions,
            groups=(view,) * self._num_groups,
            caches=self._caches,
            logits_indices=count - 1,
            max_query_len=self.length,
            max_kv_len=self.length,
        )
        logits = self._forward(metadata, input_ids, positions)
        argmax = self._ops.resolve("argmax", logits.dtype, vocab_size=logits.shape[-1])
        return DecodeOutput(logits, argmax(logits, self._flat_tokens, first + count))
