"""A short prompt's prefill as a fixed computation on the device: a quick first token.

Run eagerly, a short prompt costs more time for launching kernels than for running them. Padded to
a few lengths it is captured once, as decode steps are.
"""

from __future__ import annotations

import torch

from llmfw.attention.metadata import AttentionMetadata
from llmfw.engine.decode_step import DecodeOutput, Forward, Memory
from llmfw.ops.table import OpTable

LENGTHS = (16, 32, 64, 128, 256, 512)


class ContextStep:
    """Computes one whole prompt of at most `length` tokens and the token after it.

    Args:
        forward: The model.
        memory: What it reads and writes; padded tokens write into the padding row's block.
        length: Tokens of the padded prompt.
        ops: Finds the kernel that chooses the token.
    """

    def __init__(self, forward: Forward, memory: Memory, *, length: int, ops: OpTable) -> None:
        device = memory.flat_tokens.device
        self._forward = forward
        self._memory = memory
        self._ops = ops
        self._blocks = memory.first_blocks(length)
        self.length = length
        self._positions = torch.arange(length, device=device)
        self.inputs = torch.zeros(2, 1, dtype=torch.int64, device=device)  # row, tokens
        self.inputs[0].fill_(memory.padding_row)
        self.inputs[1].fill_(1)

    def stage(self, row: int, count: int) -> None:
        """Upload the request's row and its number of tokens; nothing waits for the device."""
        host = torch.tensor([[row], [count]], pin_memory=self.inputs.is_cuda)
        self.inputs.copy_(host, non_blocking=True)

    def compute(self) -> DecodeOutput:
        """Run the model over the staged prompt and put the greedy token behind it."""
        memory, size = self._memory, self._memory.block_size
        row, count = self.inputs[0], self.inputs[1]  # [1] each
        positions = self._positions
        first = row * memory.max_model_len
        input_ids = memory.flat_tokens.index_select(0, first + positions).long()
        table = self._blocks.index_select(0, row)  # [1, blocks]
        block = table[0].index_select(0, positions // size).long()
        spare = self._blocks[memory.padding_row, 0].long()
        block = torch.where(positions < count, block, spare)
        slots = block * size + positions % size
        cumulative = torch.cat((torch.zeros_like(count), count)).int()
        metadata = AttentionMetadata(
            query_lens=(self.length,),
            kv_lens=(self.length,),
            num_contexts=0,  # attention reads the true lengths from the device
            cu_query_lens=cumulative,
            kv_lens_device=count.int(),
            positions=positions,
            groups=memory.groups(table, slots),
            caches=memory.caches,
            logits_indices=count - 1,
            max_query_len=self.length,
            max_kv_len=self.length,
            states=memory.states,
            state_slots=row if memory.states else None,
        )
        logits = self._forward(metadata, input_ids, positions)
        argmax = self._ops.resolve("argmax", logits.dtype, vocab_size=logits.shape[-1])
        return DecodeOutput(logits, argmax(logits, memory.flat_tokens, first + count))
