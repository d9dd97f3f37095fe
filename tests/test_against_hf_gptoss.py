"""gpt-oss against transformers, on tiny random configurations that cover its switches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from c_expressions import VALUES, value_of
from llmfw.models import load_model
from llmfw.testing import PackedSession
from llmfw_gptoss.modeling import clamped_swiglu
from parity import (
    ATOL,
    assert_same_logits,
    hf_logits,
    ours_from,
    published,
    random_prompts,
    tiny_hf,
)

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"original_max_position_embeddings": 32, "rope_theta": 150000.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_parameters": {**YARN, "truncate": False}},
    "yarn_truncated": {"rope_parameters": {**YARN, "truncate": True}},
    "one_expert": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 6},
    "windows": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "no_biases_in_attention": {"attention_bias": False},
    "activation": {"swiglu_alpha": 0.7, "swiglu_limit": 0.4},
    "tied": {"tie_word_embeddings": True},
}


def tiny(case: str) -> torch.nn.Module:
    return tiny_hf(GptOssConfig(**{**BASE, **CASES[case]}), "GptOssForCausalLM", "eager")


@pytest.mark.parametrize("case", CASES)
def test_against_hf_gptoss(case: str):
    if case == "activation" and not hasattr(GptOssConfig(), "swiglu_alpha"):
        pytest.skip("this transformers has the activation's constants in its code")
    hf = tiny(case)
    assert_same_logits(hf, ours_from(hf), random_prompts(4, 128, 8, 60))


def test_against_hf_gptoss_as_published(tmp_path: Path):
    hf = tiny("plain")
    checkpoint = published(hf, tmp_path)
    assert checkpoint.info("model.layers.0.mlp.experts.down_proj").shape == (6, 32, 64)
    assert_same_logits(hf, ours_from(hf, checkpoint=checkpoint), random_prompts(2, 128, 8, 60))


def quantised(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with random MXFP4 blocks in place of its experts' matrices."""
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, value in hf.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = value.shape
            shape = (experts, rows, width // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator)
            scales = torch.randint(121, 126, shape, generator=generator)
            tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
            tensors[f"{name}_scales"] = scales.to(torch.uint8)
        else:
            tensors[name] = value.clone()
    return tensors


def test_against_hf_gptoss_in_mxfp4(tmp_path: Path):
    """transformers dequantises the same files by itself."""
    hf = tiny("plain")
    hf.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(quantised(hf), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    ours = load_model(tmp_path, dtype="float32", kernels="reference", block_size=4).model
    for ids in random_prompts(3, 128, 8, 60):
        got = PackedSession(ours).step({"a": ids})["a"]
        torch.testing.assert_close(got, hf_logits(theirs.float(), ids), atol=ATOL, rtol=0)


def test_the_activation_in_c_is_the_function():
    swiglu = clamped_swiglu(1.702, 7.0)
    for gate, up in VALUES:
        both = (torch.tensor(value, dtype=torch.float64) for value in (gate, up))
        expected = swiglu.function(*both).item()
        assert value_of(swiglu.code, gate, up) == pytest.approx(expected)
