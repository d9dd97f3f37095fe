"""The fixed decode step equals the engine's ordinary one; run eagerly here, captured on a GPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Mamba2Config

from llmfw.attention.state import StateCache
from llmfw.engine.context_step import ContextStep
from llmfw.engine.cuda_graphs import batch_sizes, kv_limits
from llmfw.engine.decode_step import BlockTableMirror, DecodeStep, Memory
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.engine.step import Chunk
from llmfw.testing import PackedSession
from parity import ours_from, random_prompts, tiny_hf

CPU = torch.device("cpu")
SIZE, ROWS, MAX_LEN, BLOCK = 4, 6, 64, 4
MAMBA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 1,
    "state_size": 8,
}


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
    )
    return ours_from(tiny_hf(config, "LlamaForCausalLM"))


def exact_lengths(model):
    """The references read lengths on the host; a step that is captured knows only the device's."""

    def forward(metadata, input_ids, positions):
        lens = tuple(metadata.kv_lens_device.tolist())
        return model(replace(metadata, kv_lens=lens), input_ids, positions)

    return forward


def test_padded_steps_give_the_tokens_of_single_ones(model):
    prompts = random_prompts(3, 128, 5, 30)
    count = 6
    expected = []
    for prompt in prompts:
        session = PackedSession(model, num_blocks=32)
        logits, tokens = session.step({"a": prompt})["a"][-1], []
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = session.step({"a": tokens[-1:]})["a"][-1]
        expected.append(tokens)

    # The same prompts prefilled in one session, whose blocks rows 4, 0 and 2 of a table then take.
    session = PackedSession(model, num_blocks=64)
    first = {name: rows[-1].argmax() for name, rows in session.step(named(prompts)).items()}
    tokens = torch.zeros(ROWS + 1, MAX_LEN, dtype=torch.int32)
    mirror = BlockTableMirror(ROWS + 1, MAX_LEN // BLOCK, CPU)
    rows = np.array([4, 0, 2])
    row_of = dict(enumerate(rows.tolist()))
    for index, (name, prompt) in enumerate(named(prompts).items()):
        tokens[rows[index], : len(prompt)] = torch.tensor(prompt)
        tokens[rows[index], len(prompt)] = first[name]
        while len(session._blocks[name]) * BLOCK < MAX_LEN:
            session._blocks[name].append(session._free.pop())
        start = Chunk(index, 0, len(prompt), True, tuple(session._blocks[name][:3]), True)
        more = Chunk(index, 0, 1, True, tuple(session._blocks[name][3:]))
        mirror.apply([start, more], row_of)
    mirror.apply([Chunk(9, 0, 1, True, (session._free.pop(),), True)], {9: ROWS})
    step = DecodeStep(
        exact_lengths(model),
        Memory(
            flat_tokens=tokens.view(-1),
            max_model_len=MAX_LEN,
            blocks=mirror.blocks,
            block_size=BLOCK,
            caches=session.caches,
            num_groups=1,
            padding_row=ROWS,
        ),
        size=SIZE,
        max_kv_len=MAX_LEN,
    )
    lengths = np.array([len(prompt) for prompt in prompts])
    got = [[int(first[name])] for name in named(prompts)]
    with torch.inference_mode():
        for turn in range(count - 1):
            step.stage(rows, lengths + turn)
            output = step.compute()
            assert output.logits.shape == (SIZE, 128)
            for index in range(3):
                got[index].append(int(output.tokens[index]))
    assert got == expected
    for index, row in enumerate(rows):
        kept = tokens[row, lengths[index] : lengths[index] + count].tolist()
        assert kept == expected[index]


def named(prompts):
    return {str(index): prompt for index, prompt in enumerate(prompts)}


def true_length(model):
    """As `exact_lengths`, for a prompt that is padded: the reference gets no padded token."""

    def forward(metadata, input_ids, positions):
        count = int(metadata.cu_query_lens[-1])
        metadata = replace(metadata, query_lens=(count,), max_query_len=count)
        return model(metadata, input_ids[:count], positions[:count])

    return forward


def test_padded_steps_continue_the_state_of_their_rows():
    """Whole prompts, then single tokens; state lies in the rows' slots, and one is for padding."""
    hf = tiny_hf(Mamba2Config(**MAMBA), "Mamba2ForCausalLM", "eager")
    model = ours_from(hf, max_model_len=MAX_LEN)
    prompts, rows, count = random_prompts(3, 128, 5, 30), np.array([4, 0, 2]), 6
    state = StateCache(model.state_specs(), ROWS + 1, CPU)
    tokens = torch.zeros(ROWS + 1, MAX_LEN, dtype=torch.int32)
    memory = Memory(
        flat_tokens=tokens.view(-1),
        max_model_len=MAX_LEN,
        blocks=torch.zeros(ROWS + 1, MAX_LEN // BLOCK, dtype=torch.int32),
        block_size=BLOCK,
        caches={},
        num_groups=0,
        padding_row=ROWS,
        states=state.layers,
    )
    ops = model.model_config.ops
    context = ContextStep(true_length(model), memory, length=32, ops=ops)
    step = DecodeStep(model, memory, size=SIZE, max_kv_len=MAX_LEN, ops=ops)
    with torch.inference_mode():
        for row, prompt in zip(rows, prompts, strict=True):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
            context.stage(int(row), len(prompt))
            context.compute()
        for turn in range(count - 1):
            step.stage(rows, np.array([len(prompt) for prompt in prompts]) + turn)
            step.compute()
    for row, prompt in zip(rows, prompts, strict=True):
        session = PackedSession(model)
        expected = [session.step({"a": prompt})["a"][-1].argmax()]
        for _ in range(count - 1):
            expected.append(session.step({"a": [int(expected[-1])]})["a"][-1].argmax())
        assert tokens[row, len(prompt) : len(prompt) + count].tolist() == expected


@pytest.mark.parametrize("op", ["causal_conv1d", "ssd_scan"])
def test_graphs_need_recurrent_kernels(op, caplog):
    """The references read lengths on the host."""
    hf = tiny_hf(Mamba2Config(**MAMBA), "Mamba2ForCausalLM", "eager")
    model = ours_from(hf, max_model_len=MAX_LEN)
    runner = ModelRunner(model, EngineSettings(max_num_seqs=2).on("cpu"), CPU)
    choices = model.model_config.ops.choices
    for key, choice in choices.items():
        choices[key] = replace(choice, chosen="reference" if choice.context.op == op else "own")
    with caplog.at_level(logging.INFO, logger="llmfw.engine"):
        assert not runner._capturable()
    assert f"no CUDA graphs: {op} runs by its reference" in caplog.text
    for key, choice in choices.items():
        choices[key] = replace(choice, chosen="own")
    assert runner._capturable()


def test_a_row_that_is_not_finite_gets_no_token():
    tokens = torch.zeros(8, dtype=torch.int32)
    step = DecodeStep(
        lambda *_: torch.tensor([[1.0, 3.0], [float("nan"), 0.0]]),
        Memory(
            flat_tokens=tokens,
            max_model_len=4,
            blocks=torch.zeros(2, 1, dtype=torch.int32),
            block_size=4,
            caches={},
            num_groups=1,
            padding_row=1,
        ),
        size=2,
        max_kv_len=4,
    )
    step.stage(np.array([0]), np.array([1]))
    assert step.compute().tokens.tolist() == [1, -1]
    assert tokens.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_the_mirror_follows_restarts():
    mirror = BlockTableMirror(2, 4, CPU)
    mirror.apply([Chunk(7, 0, 8, False, (5, 6), True)], {7: 1})
    mirror.apply([Chunk(7, 8, 1, True, (9,)), Chunk(8, 0, 1, True)], {7: 1, 8: 0})
    assert mirror.blocks.tolist() == [[0, 0, 0, 0], [5, 6, 9, 0]]
    mirror.apply([Chunk(7, 0, 4, False, (3,), True)], {7: 1})
    mirror.apply([Chunk(7, 4, 1, True, (2,))], {7: 1})
    assert mirror.blocks[1].tolist() == [3, 2, 9, 0]


def test_sizes_and_limits_end_at_the_settings():
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(256)[-3:] == [224, 240, 256]
    assert batch_sizes(512)[-3:] == [384, 448, 512]
    assert all(a < b for a, b in zip(batch_sizes(300), batch_sizes(300)[1:], strict=False))
    assert kv_limits(512) == [512]
    assert kv_limits(4096) == [1024, 4096]
    assert kv_limits(4096, attends=False) == [4096]
    assert kv_limits(131072) == [1024, 8192, 131072]


@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_padded_prompt_gives_the_token_of_an_ordinary_one(model, count: int):
    (prompt,) = random_prompts(1, 128, count, count, seed=count)
    want = PackedSession(model, num_blocks=16).step({"a": prompt})["a"][-1]
    session = PackedSession(model, num_blocks=16)
    tokens = torch.zeros(3, MAX_LEN, dtype=torch.int32)
    tokens[1, :count] = torch.tensor(prompt)
    tokens[1, count:] = 77  # what an earlier request left there
    blocks = torch.full((3, MAX_LEN // BLOCK), 15, dtype=torch.int32)
    blocks[1, :4] = torch.tensor([9, 2, 7, 4])
    step = ContextStep(
        exact_prompt(model),
        Memory(
            flat_tokens=tokens.view(-1),
            max_model_len=MAX_LEN,
            blocks=blocks,
            block_size=BLOCK,
            caches=session.caches,
            num_groups=1,
            padding_row=2,
        ),
        length=16,
        ops=model.model_config.ops,
    )
    before = [cache.k.clone() for cache in session.caches.values()]
    step.stage(1, count)
    with torch.inference_mode():
        output = step.compute()
    torch.testing.assert_close(output.logits[0], want, atol=1e-5, rtol=0)
    assert int(output.tokens) == int(want.argmax()) == int(tokens[1, count])
    mine = {9, 2, 7, 4, 15}
    for cache, old in zip(session.caches.values(), before, strict=True):
        for block in set(range(16)) - mine:
            assert torch.equal(cache.k[block], old[block])
        written = cache.k.view(-1, *cache.k.shape[2:])[9 * BLOCK]
        assert written.abs().sum() > 0


def exact_prompt(model):
    """As `exact_lengths`, for a prompt of fewer tokens than the padded batch."""

    def forward(metadata, input_ids, positions):
        (count,) = metadata.kv_lens_device.tolist()
        exact = replace(metadata, query_lens=(count,), kv_lens=(count,), num_contexts=1)
        return model(exact, input_ids, positions)

    return forward


def test_positions_that_follow_are_not_uploaded_and_others_are():
    seen = []

    def forward(metadata, input_ids, positions):
        seen.append(positions.tolist())
        return torch.zeros(2, 3)

    step = DecodeStep(
        forward,
        Memory(
            flat_tokens=torch.zeros(24, dtype=torch.int32),
            max_model_len=8,
            blocks=torch.zeros(3, 2, dtype=torch.int32),
            block_size=4,
            caches={},
            num_groups=1,
            padding_row=2,
        ),
        size=2,
        max_kv_len=8,
    )
    steps = [
        ([0], [0], [0, 0]),
        ([0], [1], [1, 0]),
        ([0, 1], [2, 1], [2, 1]),
        ([0, 1], [3, 2], [3, 2]),
        ([1], [3], [3, 0]),
        ([0], [4], [4, 0]),
        ([0], [6], [6, 0]),
    ]
    uploads = []
    for rows, positions, expected in steps:
        before = step.inputs.clone()
        step.stage(np.array(rows), np.array(positions))
        uploads.append(not torch.equal(step.inputs, before))
        with torch.inference_mode():
            step.compute()
        assert seen[-1] == expected
    assert uploads == [True, False, True, False, True, True, True]
