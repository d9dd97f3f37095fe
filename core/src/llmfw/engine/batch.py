"""From a step's chunks to the packed tensors that the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from llmfw.attention.metadata import AttentionMetadata, CacheGroupView, LayerCache
from llmfw.engine.request_table import RequestTable
from llmfw.engine.step import Chunk, StepInput

Group = tuple[torch.dtype, list[np.ndarray]]  # flat arrays, and what they become


@dataclass(frozen=True, slots=True)
class Batch:
    """A step, packed.

    input_ids, position_ids: int64 [tokens] (device).
    sample_seq_ids: sequences that get a token, in the order of the first rows of logits.
    sample_rows, sample_positions: their rows in the table, and where in the sequence the token will
        stand (host).
    sample_targets: int64, where in RequestTable.flat_tokens it goes (device).
    prompt_rows: for each sequence that wants something of its prompt: (sequence, position of its
        first logits row in the prompt, number of rows); these rows of logits follow those that are
        sampled.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    metadata: AttentionMetadata
    sample_seq_ids: tuple[int, ...]
    sample_rows: np.ndarray
    sample_positions: np.ndarray
    sample_targets: torch.Tensor
    prompt_rows: tuple[tuple[int, int, int], ...] = ()


class BatchBuilder:
    """Builds batches from a request table in a few array operations a step.

    Args:
        table: The worker's sequences.
        caches: K and V by layer index.
        num_groups: Groups of layers; they share one block table.
        device: Where the tensors go.
        states: Recurrent state by layer index; a sequence's slot is its row of the table.
    """

    def __init__(
        self,
        table: RequestTable,
        caches: Mapping[int, LayerCache],
        num_groups: int,
        device: torch.device,
        states: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self.table = table
        self.states = states or {}
        self.caches = caches
        self.num_groups = num_groups
        self.device = device

    def build(self, step: StepInput) -> Batch:
        """Pack a step whose deltas the table has applied; nothing waits for the device."""
        table = self.table
        chunks = step.chunks
        rows = table.rows_of(tuple(chunk.seq_id for chunk in chunks))
        starts = np.array([chunk.start for chunk in chunks])
        if step.num_generations == len(chunks):
            return self._pack_generations(chunks, rows, starts)
        lens = np.array([chunk.num_tokens for chunk in chunks])
        ends = np.cumsum(lens)
        owner = np.repeat(np.arange(len(chunks)), lens)  # [tokens], the chunk of each token
        positions = np.arange(ends[-1]) + (starts - ends + lens)[owner]
        samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        prompt_rows, prompt_indices = self._prompt_rows(chunks, rows, ends - lens)
        logits_indices = np.concatenate([ends[samples] - 1, *prompt_indices])
        kv_lens = starts + lens
        return self._finish(
            chunks,
            rows,
            kv_lens,
            token_rows=rows[owner],
            positions=positions,
            query_lens=tuple(lens.tolist()),
            cu_query_lens=np.concatenate([[0], ends]),
            sample_seq_ids=tuple(chunk.seq_id for chunk in chunks if chunk.samples),
            sample_rows=rows[samples],
            sample_positions=kv_lens[samples],
            logits_indices=logits_indices,
            num_contexts=len(chunks) - step.num_generations,
            prompt_rows=prompt_rows,
        )

    def _pack_generations(
        self, chunks: tuple[Chunk, ...], rows: np.ndarray, starts: np.ndarray
    ) -> Batch:
        """Every chunk has one token: a token's index is its request's."""
        seq_ids = tuple(chunk.seq_id for chunk in chunks)
        prompt_rows: tuple[tuple[int, int, int], ...] = ()
        logits_indices = None
        sample_rows, kv_lens = rows, starts + 1
        sample_positions = kv_lens
        wanted, prompt_indices = self._prompt_rows(chunks, rows, np.arange(len(chunks)))
        if wanted or not all(chunk.samples for chunk in chunks):
            samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
            prompt_rows = wanted
            logits_indices = np.concatenate([np.flatnonzero(samples), *prompt_indices])
            seq_ids = tuple(chunk.seq_id for chunk in chunks if chunk.samples)
            sample_rows, sample_positions = rows[samples], kv_lens[samples]
        return self._finish(
            chunks,
            rows,
            kv_lens,
            token_rows=rows,
            positions=starts,
            query_lens=(1,) * len(chunks),
            cu_query_lens=np.arange(len(chunks) + 1),
            sample_seq_ids=seq_ids,
            sample_rows=sample_rows,
            sample_positions=sample_positions,
            logits_indices=logits_indices,
            num_contexts=0,
            prompt_rows=prompt_rows,
        )

    def _finish(
        self,
        chunks: tuple[Chunk, ...],
        rows: np.ndarray,
        kv_lens: np.ndarray,
        *,
        token_rows: np.ndarray,
        positions: np.ndarray,
        query_lens: tuple[int, ...],
        cu_query_lens: np.ndarray,
        sample_seq_ids: tuple[int, ...],
        sample_rows: np.ndarray,
        sample_positions: np.ndarray,
        logits_indices: np.ndarray | None,
        num_contexts: int,
        prompt_rows: tuple[tuple[int, int, int], ...],
    ) -> Batch:
        table = self.table
        size = table.block_size
        host_kv_lens = tuple(kv_lens.tolist())
        max_kv_len = max(host_kv_lens)
        block, offset = np.divmod(positions, size)
        slots = table.blocks[token_rows, block].astype(np.int64) * size + offset
        wide = [
            token_rows * table.max_model_len + positions,
            positions,
            slots,
            sample_rows * table.max_model_len + sample_positions,
        ]
        if logits_indices is not None:
            wide.append(logits_indices)
        if self.states:
            wide.append(rows)
        tables = table.blocks[rows, : -(-max_kv_len // size)]
        narrow = [cu_query_lens, kv_lens, tables.reshape(-1)]
        both = upload_all([(torch.int64, wide), (torch.int32, narrow)], self.device)
        (token_index, position_ids, slots_, targets, *indices), (cu, kv, flat_tables) = both
        view = CacheGroupView(flat_tables.view(tables.shape), slots_, size)
        metadata = AttentionMetadata(
            query_lens=query_lens,
            kv_lens=host_kv_lens,
            num_contexts=num_contexts,
            cu_query_lens=cu,
            kv_lens_device=kv,
            positions=position_ids,
            groups=(view,) * self.num_groups,
            caches=self.caches,
            logits_indices=None if logits_indices is None else indices[0],
            max_query_len=max(query_lens),
            max_kv_len=max_kv_len,
            states=self.states,
            state_slots=indices[-1] if self.states else None,
        )
        return Batch(
            input_ids=table.flat_tokens.index_select(0, token_index).long(),
            position_ids=position_ids,
            metadata=metadata,
            sample_seq_ids=sample_seq_ids,
            sample_rows=sample_rows,
            sample_positions=sample_positions,
            sample_targets=targets,
            prompt_rows=prompt_rows,
        )

    def _prompt_rows(
        self, chunks: tuple[Chunk, ...], rows: np.ndarray, offsets: np.ndarray
    ) -> tuple[tuple[tuple[int, int, int], ...], list[np.ndarray]]:
        """Which packed tokens of prompts have logits that are wanted beside the sampled ones."""
        table = self.table
        wanted = []
        indices = []
        for index in np.flatnonzero(table.prompt_rows[rows]):
            chunk, row = chunks[index], rows[index]
            start = max(chunk.start, int(table.prompt_first[row]))
            end = min(chunk.start + chunk.num_tokens, int(table.prompt_rows[row]))
            if end > start:
                wanted.append((chunk.seq_id, start, end - start))
                indices.append(np.arange(start, end) + (offsets[index] - chunk.start))
        return tuple(wanted), indices


def upload(
    arrays: list[np.ndarray], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Flat arrays as tensors on the device: as they are on a CPU, in one copy elsewhere."""
    return upload_all([(dtype, arrays)], device)[0]


def upload_all(groups: list[Group], device: torch.device) -> list[list[torch.Tensor]]:
    """The same for several dtypes, the widest first, so that all are aligned in their one copy."""
    if device.type == "cpu":
        return [
            [torch.from_numpy(array.astype(_NUMPY[dtype], copy=False)) for array in arrays]
            for dtype, arrays in groups
        ]
    return in_one_copy(groups, device)


def in_one_copy(groups: list[Group], device: torch.device) -> list[list[torch.Tensor]]:
    """Put all arrays side by side into one buffer, page-locked for a GPU, and copy that."""
    sizes = [[len(array) for array in arrays] for _, arrays in groups]
    nbytes = [dtype.itemsize * sum(each) for (dtype, _), each in zip(groups, sizes, strict=True)]
    staged = torch.empty(sum(nbytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for (dtype, arrays), part in zip(groups, staged.split(nbytes), strict=True):
        np.concatenate(arrays, out=part.view(dtype).numpy(), casting="same_kind")
    parts = staged.to(device, non_blocking=True).split(nbytes)
    return [
        list(part.view(dtype).split(each))
        for (dtype, _), part, each in zip(groups, parts, sizes, strict=True)
    ]


_NUMPY = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
