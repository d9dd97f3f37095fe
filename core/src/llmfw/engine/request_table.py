"""The worker's memory of sequences: counts and blocks on the host, token values on the device.

The host side holds only what follows from counts, so a step can be prepared before the tokens of
the one before it are known; values stay on the device, where sampling puts them and the next step
gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from llmfw.engine.step import Chunk, Fork, NewRequest, StepInput


class Feature(IntFlag):
    """What a row's sampling needs; a batch in which no row needs anything is argmax alone."""

    RANDOM = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16
    EDITS = 32  # logit_bias, bad words of one token, min_tokens
    BAD_WORDS = 64  # of several tokens
    LOGPROBS = 128
    BEAM = 256
    LOGITS = 512


@dataclass(frozen=True, slots=True)
class RowExtras:
    """The rarely used parameters of one row, as arrays ready to be joined."""

    new: NewRequest
    edit_ids: np.ndarray  # int64, added to at every step
    edit_values: np.ndarray  # float32
    stop_ids: np.ndarray  # int64, impossible before min_tokens
    bad_words: tuple[tuple[int, ...], ...]  # of several tokens


class RequestTable:
    """Rows of at most `max_num_seqs` sequences.

    Args:
        max_num_seqs: Rows.
        max_model_len: Tokens a row has room for.
        block_size: Tokens a cache block.
        device: Where token values live.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.padding_row = max_num_seqs  # of tokens alone: what padded batches read and write
        self.tokens = torch.zeros(max_num_seqs + 1, max_model_len, dtype=torch.int32, device=device)
        self.flat_tokens = self.tokens.view(-1)
        max_blocks = -(-max_model_len // block_size)
        self.blocks = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self.seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self.features = np.zeros(max_num_seqs, dtype=np.int64)
        # The rows of logits of prompt tokens that are wanted: from the first on, before the end.
        self.prompt_first = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_rows = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_candidates = np.zeros(max_num_seqs, dtype=np.int64)  # of beams
        self.numbers = np.zeros((max_num_seqs, len(NUMBERS)), dtype=np.float32)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self.extras: list[RowExtras | None] = [None] * max_num_seqs
        self.row_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def apply(self, step: StepInput) -> None:
        """Forget finished sequences, make new ones, fork beams, note the blocks of the chunks."""
        for seq_id in step.finished:
            row = self.row_of.pop(seq_id)
            self.extras[row] = None
            self._free.append(row)
        for new in step.new:
            self._add(new)
        if step.forks:
            self._fork(step.forks)
        for chunk in step.grown:
            self._note_blocks(chunk)

    def rows_of(self, seq_ids: tuple[int, ...]) -> np.ndarray:
        """The sequences' rows, int64."""
        return np.fromiter(map(self.row_of.__getitem__, seq_ids), np.int64, len(seq_ids))

    def clear(self) -> None:
        """Forget all sequences."""
        self._free += self.row_of.values()
        self.row_of.clear()

    def _add(self, new: NewRequest) -> None:
        row = self._free.pop()
        self.row_of[new.seq_id] = row
        prompt = new.prompt_token_ids
        staged = torch.empty(len(prompt), dtype=torch.int32, pin_memory=self.tokens.is_cuda)
        staged.numpy()[:] = np.array(prompt, dtype=np.int32)
        self.tokens[row, : len(prompt)].copy_(staged, non_blocking=True)
        sampling = new.sampling
        self.prompt_lens[row] = len(prompt)
        self.seeds[row] = new.seed
        self.numbers[row] = [getattr(sampling, name) for name in NUMBERS]
        self.prompt_first[row] = self.prompt_rows[row] = 0
        if sampling.return_context_logits:
            self.prompt_rows[row] = len(prompt)
        elif sampling.prompt_logprobs is not None:
            self.prompt_first[row] = sampling.first_prompt_row
            self.prompt_rows[row] = len(prompt) - 1
        self.num_candidates[row] = new.num_candidates
        self.top_k[row] = sampling.top_k or 0
        extras = _extras(new)
        self.extras[row] = extras
        self.features[row] = _features(new, extras)

    def _fork(self, forks: tuple[Fork, ...]) -> None:
        """Give each fork's row the tokens of its parent's, and its own token after them."""
        row_of, width = self.row_of, self.max_model_len
        columns = [
            [row_of[fork.seq_id] for fork in forks],
            [row_of[fork.parent] for fork in forks],
            [row_of[fork.seq_id] * width + fork.position for fork in forks],
            [fork.token for fork in forks],
        ]
        staged = torch.tensor(columns, pin_memory=self.tokens.is_cuda)
        rows, parents, places, tokens = staged.to(self.tokens.device, non_blocking=True)
        told = self.tokens[:, : max(fork.position for fork in forks)]
        told.index_copy_(0, rows, told.index_select(0, parents))
        self.flat_tokens.index_copy_(0, places, tokens.int())

    def _note_blocks(self, chunk: Chunk) -> None:
        row = self.row_of[chunk.seq_id]
        start = 0 if chunk.restart else int(self.num_blocks[row])
        end = start + len(chunk.blocks)
        self.blocks[row, start:end] = chunk.blocks
        self.num_blocks[row] = end


#: Columns of RequestTable.numbers.
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _extras(new: NewRequest) -> RowExtras:
    bias = dict(new.sampling.logit_bias or {})
    bias |= {word[0]: float("-inf") for word in new.bad_words if len(word) == 1}
    return RowExtras(
        new,
        np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
        np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        np.array(new.stop_ids if new.sampling.min_tokens else (), dtype=np.int64),
        tuple(word for word in new.bad_words if len(word) > 1),
    )


def _features(new: NewRequest, extras: RowExtras) -> int:
    sampling = new.sampling
    features = Feature(0)
    if not sampling.greedy:
        features |= Feature.RANDOM
        if sampling.top_k is not None and sampling.top_k > 0:
            features |= Feature.TOP_K
        if sampling.top_p is not None and sampling.top_p < 1.0:
            features |= Feature.TOP_P
        if sampling.min_p:
            features |= Feature.MIN_P
    if (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    ):
        features |= Feature.PENALTIES
    if len(extras.edit_ids) or len(extras.stop_ids):
        features |= Feature.EDITS
    if extras.bad_words:
        features |= Feature.BAD_WORDS
    if new.num_candidates:
        features |= Feature.BEAM  # its log probabilities are those of its candidates
    elif sampling.logprobs is not None:
        features |= Feature.LOGPROBS
    if sampling.return_generation_logits:
        features |= Feature.LOGITS
    return int(features)
