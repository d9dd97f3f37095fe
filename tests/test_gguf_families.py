"""GGUF files of the families give transformers' logits: names by gguf's own tables, not by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, Qwen2Config, Qwen3MoeConfig

from gguf_files import TOKENS, write_gguf
from llmfw.models import load_model
from llmfw.testing import PackedSession
from parity import ATOL, hf_logits, random_prompts, tiny_hf

BASE: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "eos_token_id": None,
    "bos_token_id": None,
}
HEAD = {"head_dim": 32}
WINDOW = {"sliding_window": 9}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERT_SIZES = {
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 24,
}
CASES: dict[str, tuple[str, Any, dict[str, int]]] = {
    "qwen2": ("Qwen2ForCausalLM", Qwen2Config(**BASE), {}),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        Qwen3MoeConfig(**BASE, **HEAD, **EXPERTS, norm_topk_prob=True),
        EXPERT_SIZES,
    ),
    "gemma": ("GemmaForCausalLM", GemmaConfig(**BASE, **HEAD), {}),
    "gemma2": (
        "Gemma2ForCausalLM",
        Gemma2Config(**BASE, **HEAD, **WINDOW),
        {"attention.sliding_window": 9},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        Gemma3TextConfig(**BASE, **HEAD, **WINDOW),
        {"attention.sliding_window": 9},
    ),
}


def ggml_tensors(arch: str, hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as llama.cpp's converter writes them."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 2)
    tensors = {}
    for name, value in published(hf).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        offset = float(arch.startswith("gemma") and name.endswith("norm.weight"))
        tensors[theirs] = value + offset
    return tensors


def published(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with its experts' products apart and the tied head left out."""
    tensors = {}
    for name, value in hf.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            tensors |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors[f"{name}.weight"] = value
        elif name != "lm_head.weight":
            tensors[name] = value
    return tensors


@pytest.mark.parametrize("arch", CASES)
def test_a_gguf_file_gives_transformers_logits(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))
    architecture, config, sizes = CASES[arch]
    hf = tiny_hf(config, architecture, "eager")
    for parameter in hf.parameters():  # unpacked files of this size are kept in bfloat16
        parameter.data = parameter.data.bfloat16().float()
    if HEAD["head_dim"] == getattr(config, "head_dim", None):
        sizes = {**sizes, "attention.key_length": 32}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    metadata = {f"{arch}.{key}": value for key, value in caps.items() if arch == "gemma2"}
    file = write_gguf(
        tmp_path / "x.gguf", ggml_tensors(arch, hf), arch=arch, sizes=sizes, metadata=metadata
    )
    loaded = load_model(file, dtype="float32", kernels="reference", block_size=4)
    assert loaded.model_config.pretrained_config.architectures == [architecture]
    for ids in random_prompts(2, len(TOKENS), 20, 40):
        got = PackedSession(loaded.model).step({"a": ids})["a"]
        torch.testing.assert_close(got, hf_logits(hf, ids), atol=ATOL, rtol=0)
