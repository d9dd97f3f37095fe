"""A thousand requests at once on a GPU: none is lost, none disturbs another, no block leaks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from llmfw import LLM
from llmfw.request import FinishReason
from llmfw.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
COUNT, COMPARED, VOCAB, BLOCKS = 1000, 40, 1000, 256
TIE = 1e-4  # logits of float32 that are nearer to each other may change places
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Short and long, greedy and drawn, some that stop at one of many tokens."""
    rng = random.Random(0)
    made = []
    for index in range(COUNT):
        length = rng.choice((1, 5, rng.randint(2, 60), rng.randint(100, 700)))
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        sampling = SamplingParams(
            temperature=0.0 if index % 3 else 0.8,
            seed=index,
            top_k=None if index % 3 else 4,  # among few tokens rounding hardly moves a draw
            top_p=0.9 if index % 6 == 0 else 1.0,
            max_tokens=rng.choice((1, rng.randint(2, 40), rng.randint(100, 200))),
            stop_token_ids=rng.sample(range(VOCAB), 20) if index % 4 == 1 else None,
            ignore_eos=True,
        )
        made.append((prompt, sampling))
    return made


def test_a_thousand_requests_with_stops_aborts_and_preemptions(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    block_bytes = 2 * 2 * 2 * 64 * 4 * 16  # K and V, layers, heads, features, bytes, tokens
    wanted = requests()
    with LLM(
        tmp_path,
        device="cuda",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=1024,
        kv_cache_memory=BLOCKS * block_bytes,
    ) as llm:
        handles = [llm.generate_async(*request) for request in wanted]
        aborted = set(range(0, COUNT, 9))
        for index in sorted(aborted, key=lambda index: index % 7):  # while others run
            llm.abort(handles[index])
            if index % 5 == 0:
                handles[index].result()
        outputs = [handle.result(timeout=120) for handle in handles]
        stats = llm.stats()
        alone = range(1, COUNT, COUNT // COMPARED)
        single = {index: _alone(llm, *wanted[index]) for index in alone if index not in aborted}
    assert stats.preemptions > 0
    assert stats.kv_blocks == BLOCKS
    assert stats.kv_blocks_used == stats.running == stats.waiting == 0
    assert stats.finished + stats.aborted == COUNT
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}
    for index, (output, (_, sampling)) in enumerate(zip(outputs, wanted, strict=True)):
        completion = output.outputs[0]
        assert output.error is None
        if completion.finish_reason is FinishReason.ABORT:
            assert index in aborted
        elif completion.finish_reason is FinishReason.STOP:
            assert completion.token_ids[-1] in sampling.stop_token_ids
        else:
            assert len(completion.token_ids) == sampling.max_tokens
    differing = [
        index
        for index, (tokens, logits) in single.items()
        if not _same(outputs[index].outputs[0].token_ids, tokens, logits, wanted[index][1])
    ]
    assert len(single) > COMPARED // 2
    assert not differing


def _alone(llm: LLM, prompt: list[int], sampling: SamplingParams) -> tuple[list[int], np.ndarray]:
    output = llm.generate(prompt, sampling.replace(return_generation_logits=True)).outputs[0]
    return output.token_ids, output.generation_logits


def _same(
    tokens: list[int], reference: list[int], logits: np.ndarray, sampling: SamplingParams
) -> bool:
    """Equal, or different from a tie on; a draw that lies on a border within rounding is rare."""
    for ours, theirs, row in zip(tokens, reference, logits, strict=False):
        if ours != theirs:
            return sampling.greedy and abs(float(row[ours] - row[theirs])) < TIE
    return len(tokens) == len(reference)
