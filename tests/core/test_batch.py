from __future__ import annotations

import numpy as np
import torch

from engine_models import CPU, HistoryModel
from llmfw.attention.backend import get_attention_backend
from llmfw.engine import kv_cache
from llmfw.engine.batch import BatchBuilder, in_one_copy, upload, upload_all
from llmfw.engine.request_table import RequestTable
from llmfw.engine.step import Chunk, NewRequest, StepInput
from llmfw.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0).resolved()


def new(seq_id: int, prompt, **sampling) -> NewRequest:
    params = SamplingParams(temperature=0, **sampling).resolved() if sampling else GREEDY
    return NewRequest(seq_id, tuple(prompt), params)


def builder(groups: int = 1) -> BatchBuilder:
    specs = HistoryModel(groups=groups).cache_specs()
    caches = kv_cache.allocate(specs, 8, 4, CPU, get_attention_backend("auto"))
    return BatchBuilder(RequestTable(4, 32, 4, CPU), caches, groups, CPU)


def build(made: BatchBuilder, step: StepInput):
    made.table.apply(step)
    return made.build(step)


def test_mixed_batch_is_packed_context_first():
    made = builder()
    build(made, StepInput(1, (Chunk(1, 0, 5, True, (3, 1), True),), 0, (new(1, range(10, 15)),)))
    made.table.tokens[made.table.row_of[1], 5] = 99  # as the sampler leaves it
    step = StepInput(
        2,
        (Chunk(2, 0, 4, False, (0,), True), Chunk(1, 5, 1, True)),
        1,
        (new(2, range(20, 26)),),
    )
    batch = build(made, step)
    metadata = batch.metadata
    assert batch.input_ids.tolist() == [20, 21, 22, 23, 99]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 5]
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert metadata.query_lens == (4, 1)
    assert metadata.kv_lens == (4, 6)
    assert metadata.num_contexts == 1
    assert metadata.num_generations == 1
    assert metadata.cu_query_lens.tolist() == [0, 4, 5]
    assert metadata.cu_query_lens.dtype == metadata.kv_lens_device.dtype == torch.int32
    assert metadata.kv_lens_device.tolist() == [4, 6]
    assert (metadata.max_query_len, metadata.max_kv_len) == (4, 6)
    assert metadata.logits_indices.tolist() == [4]
    assert batch.sample_seq_ids == (1,)
    assert batch.sample_positions.tolist() == [6]
    view = metadata.groups[0]
    assert view.slots.tolist() == [0, 1, 2, 3, 1 * 4 + 1]
    assert view.block_tables.dtype == torch.int32
    assert view.block_tables[0, :1].tolist() == [0]
    assert view.block_tables[1, :2].tolist() == [3, 1]


def test_batch_of_generations_wants_all_logits():
    made = builder()
    chunks = (Chunk(1, 0, 1, True, (2,), True), Chunk(2, 0, 1, True, (5,), True))
    batch = build(made, StepInput(1, chunks, 2, (new(1, [7]), new(2, [8]))))
    assert batch.metadata.logits_indices is None
    assert batch.metadata.num_contexts == 0
    assert batch.input_ids.tolist() == [7, 8]
    assert batch.metadata.groups[0].slots.tolist() == [8, 20]
    assert batch.sample_seq_ids == (1, 2)


def test_a_one_token_chunk_that_samples_nothing_wants_no_logits():
    made = builder()
    chunks = (Chunk(1, 0, 1, False, (2,), True), Chunk(2, 0, 1, True, (5,), True))
    batch = build(made, StepInput(1, chunks, 2, (new(1, [7, 8]), new(2, [9]))))
    assert batch.metadata.logits_indices.tolist() == [1]
    assert batch.sample_seq_ids == (2,)


def test_prompt_logprobs_rows_follow_the_sampled_ones():
    made = builder()
    asked = new(1, [7, 8, 9], prompt_logprobs=1)
    batch = build(made, StepInput(1, (Chunk(1, 0, 3, True, (0,), True),), 0, (asked,)))
    assert batch.metadata.logits_indices.tolist() == [2, 0, 1]
    assert batch.prompt_rows == ((1, 0, 2),)
    batch = build(made, StepInput(2, (Chunk(1, 3, 1, True),), 1))
    assert batch.prompt_rows == ()


def test_rows_before_the_first_that_is_wanted_are_left_out():
    made = builder()
    asked = new(1, [7, 8, 9, 5, 6], prompt_logprobs=0, prompt_logprobs_start=3)
    batch = build(made, StepInput(1, (Chunk(1, 0, 2, False, (0,), True),), 0, (asked,)))
    assert batch.prompt_rows == ()
    batch = build(made, StepInput(2, (Chunk(1, 2, 3, True, (1,)),), 0))
    assert batch.metadata.logits_indices.tolist() == [2, 0, 1]
    assert batch.prompt_rows == ((1, 2, 2),)


def test_restart_replaces_the_table_and_finished_rows_are_used_again():
    made = builder()
    build(made, StepInput(1, (Chunk(1, 0, 5, True, (3, 1), True),), 0, (new(1, range(5)),)))
    batch = build(made, StepInput(2, (Chunk(1, 0, 6, True, (6, 7), True),), 0))
    assert batch.metadata.groups[0].block_tables[0, :2].tolist() == [6, 7]
    row = made.table.row_of[1]
    step = StepInput(3, (Chunk(2, 0, 1, True, (0,), True),), 1, (new(2, [4]),), finished=(1,))
    batch = build(made, step)
    assert made.table.row_of == {2: row}
    assert batch.input_ids.tolist() == [4]


def test_groups_share_one_table():
    made = builder(groups=2)
    batch = build(made, StepInput(1, (Chunk(1, 0, 2, True, (3,), True),), 0, (new(1, [1, 2]),)))
    assert len(batch.metadata.groups) == 2
    assert {cache.group for cache in batch.metadata.caches.values()} == {0, 1}


def test_one_copy_holds_several_dtypes():
    wide, narrow = [np.array([1, 2, 1 << 40]), np.array([], dtype=np.int64)], [np.arange(3)]
    groups = [(torch.int64, wide), (torch.int32, narrow)]
    for found in (upload_all(groups, CPU), in_one_copy(groups, CPU)):
        (first, empty), (second,) = found
        assert first.tolist() == [1, 2, 1 << 40]
        assert second.tolist() == [0, 1, 2]
        assert (len(empty), first.dtype, second.dtype) == (0, torch.int64, torch.int32)
    *_, (second,) = in_one_copy(groups, CPU)
    (first, _), _ = in_one_copy(groups, CPU)
    assert second.storage_offset() == 6
    assert first.is_contiguous()


def test_upload_makes_the_dtype():
    first, second = upload([np.array([1, 2]), np.array([3])], torch.int32, CPU)
    assert (first.tolist(), second.tolist()) == ([1, 2], [3])
    assert first.dtype == torch.int32
