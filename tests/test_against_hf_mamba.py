"""The Mamba family against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

from llmfw import ConfigError, Mapping
from llmfw.testing import PackedSession
from llmfw.weights import MemoryCheckpoint
from parity import NORMALISES_GROUPS, assert_same_logits, ours_from, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "n_groups": 1 + NORMALISES_GROUPS}
GROUPED = pytest.mark.skipif(
    not NORMALISES_GROUPS,
    reason="before 5.23 transformers normalises over all groups at once, unlike mamba_ssm",
)
SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"use_bias": True},
    "no_conv_bias": {"use_conv_bias": False},
    "long_kernel": {"conv_kernel": 6},
    "short_kernel": {"conv_kernel": 2},
    "residual_in_dtype": {"residual_in_fp32": False},
    "eps": {"layer_norm_epsilon": 1e-2},
    "activation": {"hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
}
MAMBA: dict[str, dict[str, Any]] = {
    **SHARED,
    "wide": {"expand": 3},
    "rank": {"time_step_rank": 7},
}
MAMBA2: dict[str, dict[str, Any]] = {
    **SHARED,
    "one_group": {"n_groups": 1},
    "two_groups": {"n_groups": 2},
    "a_group_each": {"n_groups": 8},
    "wide": {"expand": 3, "num_heads": 12},
    "step_limits": {"time_step_limit": (0.3, 0.9)},
    "their_chunks": {"chunk_size": 16},
}


def prompts() -> list[list[int]]:
    return random_prompts(3, 128, 8, 60) + random_prompts(1, 128, 150, 150)


@pytest.mark.parametrize("case", MAMBA)
def test_against_hf_mamba(case: str):
    hf = tiny_hf(MambaConfig(**{**BASE, **MAMBA[case]}), "MambaForCausalLM", "eager")
    assert_same_logits(hf, ours_from(hf, max_model_len=256), prompts())


@pytest.mark.parametrize("case", ["plain", "biases", "mixer_eps"])
def test_against_hf_falcon_mamba(case: str):
    changes = {"mixer_rms_eps": 1e-2} if case == "mixer_eps" else SHARED[case]
    hf = tiny_hf(FalconMambaConfig(**{**BASE, **changes}), "FalconMambaForCausalLM", "eager")
    assert_same_logits(hf, ours_from(hf, max_model_len=256), prompts())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=GROUPED if changes.get("n_groups", 1) > 1 else ())
        for case, changes in MAMBA2.items()
    ],
)
def test_against_hf_mamba2(case: str):
    hf = tiny_hf(Mamba2Config(**{**BASE, **HEADS, **MAMBA2[case]}), "Mamba2ForCausalLM", "eager")
    assert_same_logits(hf, ours_from(hf, max_model_len=256), prompts())


@pytest.mark.parametrize("version", [1, 2])
def test_against_hf_mamba_in_bfloat16(version: int):
    """In a dtype that rounds, ours is no farther from float32 than transformers' own."""
    config = MambaConfig(**BASE) if version == 1 else Mamba2Config(**BASE, **HEADS)
    hf = tiny_hf(config, "MambaForCausalLM" if version == 1 else "Mamba2ForCausalLM", "eager")
    ids = prompts()[0]
    exact = hf(torch.tensor([ids])).logits[0]
    ours = PackedSession(ours_from(hf, max_model_len=256, dtype=torch.bfloat16))
    theirs = hf.to(torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    error = (ours.step({"a": ids})["a"].float() - exact).norm()
    assert error <= 1.2 * (theirs - exact).norm()


def test_against_hf_mamba_with_the_embedding_in_the_singular():
    hf = tiny_hf(MambaConfig(**BASE), "MambaForCausalLM", "eager")
    tensors = {name: value.clone() for name, value in hf.state_dict().items()}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    del tensors["lm_head.weight"]
    model = ours_from(hf, checkpoint=MemoryCheckpoint(tensors), max_model_len=256)
    assert_same_logits(hf, model, prompts())


def test_it_is_not_split_over_ranks():
    hf = tiny_hf(MambaConfig(**BASE), "MambaForCausalLM", "eager")
    with pytest.raises(ConfigError, match="not split over ranks"):
        ours_from(hf, max_model_len=256, mapping=Mapping(world_size=2, tp_size=2))
