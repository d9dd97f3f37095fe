"""Beams of `LLM` are those of transformers' `generate`: tiny models, and the real SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmfw import LLM, RequestOutput, SamplingParams
from llmfw.weights import resolve_model
from parity import random_prompts, tiny_hf

CONFIG: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 5,
    "bos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
ENDS = [5, 6, 11, 30, 41, 52, 63, 74, 85, 96, 107, 118]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "canonical": {"length_penalty": 0.0, "early_stopping": "never"},
    "early": {"length_penalty": 0.3, "early_stopping": True},
    "short": {"length_penalty": -1.0},
    "patient": {"length_penalty": 0.5, "early_stopping": "never"},
    "edited": {"repetition_penalty": 1.3, "min_tokens": 4, "bad_words": [[7], [9, 10], [1, 2, 3]]},
}
PROMPTS = [
    "Born in north-east France, Soyer trained as a",
    "The capital of France is",
    "Once upon a time, in a small village,",
    "The quick brown fox",
    "Water boils at",
    "In 1969, astronauts",
    "def fibonacci(n):",
    "The meaning of life is",
    "Roses are red, violets are",
    "To make a good cup of tea, first",
    "The largest planet in the solar system is",
    "My favourite book is",
    "Photosynthesis is the process by which",
    "It was a dark and stormy night;",
    "The three primary colours are",
    "Shakespeare wrote",
    "A triangle has",
    "The stock market fell today because",
    "Dear Sir or Madam,",
    "I think, therefore",
]
FULL_STOP = 30  # in SmolLM2's vocabulary: some of the beams end


def theirs(
    hf: Any, ids: Sequence[int], ends: list[int], params: SamplingParams
) -> list[tuple[list[int], float]]:
    """transformers' sequences without padding, and their scores."""
    more = {
        "bad_words_ids": [list(word) for word in params.bad_words or ()] or None,
        "repetition_penalty": params.repetition_penalty,
        "min_new_tokens": params.min_tokens or None,
    }
    found = hf.generate(
        torch.tensor([list(ids)]),
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens,
        eos_token_id=ends,
        pad_token_id=-1,
        return_dict_in_generate=True,
        output_scores=True,
        **{name: value for name, value in more.items() if value is not None},
    )
    rows = [row[len(ids) :].tolist() for row in found.sequences]
    tokens = [row[: row.index(-1)] if -1 in row else row for row in rows]
    return list(zip(tokens, found.sequences_scores.tolist(), strict=True))


def assert_same(
    hf: Any, outputs: Sequence[RequestOutput], ends: list[int], params: SamplingParams
) -> None:
    for output in outputs:
        expected = theirs(hf, output.prompt_token_ids, ends, params)
        assert [each.token_ids for each in output.outputs] == [tokens for tokens, _ in expected]
        for completion, (tokens, score) in zip(output.outputs, expected, strict=True):
            assert completion.cumulative_logprob is not None
            normalised = completion.cumulative_logprob / len(tokens) ** params.length_penalty
            assert normalised == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_of_a_tiny_model(variant: str, tmp_path: Path):
    hf = tiny_hf(LlamaConfig(**CONFIG), "LlamaForCausalLM")
    hf.save_pretrained(tmp_path)
    params = SamplingParams(
        num_beams=4, n=3, max_tokens=16, stop_token_ids=ENDS[1:], **VARIANTS[variant]
    )
    with LLM(tmp_path, skip_tokenizer_init=True, block_size=8) as llm:
        outputs = llm.generate(random_prompts(10, 128, 1, 40), params)
    assert {len(each.token_ids) for output in outputs for each in output.outputs} != {16}
    assert_same(hf, outputs, ENDS, params)


@pytest.mark.slow
def test_beams_of_smollm2():
    source = resolve_model("smollm2")
    hf: Any = AutoModelForCausalLM.from_pretrained(source.model_dir, dtype=torch.float32)
    hf.generation_config.do_sample = False
    params = SamplingParams(num_beams=4, n=2, max_tokens=12, stop_token_ids=[FULL_STOP])
    with LLM("smollm2", dtype="float32", max_model_len=256) as llm:
        assert llm.tokenizer is not None
        assert llm.tokenizer.encode(".") == [FULL_STOP]
        ends = sorted({FULL_STOP, *llm._engine._intake.eos_ids})
        for variant, prompts in (
            ("plain", PROMPTS),
            ("early", PROMPTS[:5]),
            ("patient", PROMPTS[5:9]),
        ):
            how = params.replace(**VARIANTS[variant])
            assert_same(hf.eval(), llm.generate(prompts, how), ends, how)
