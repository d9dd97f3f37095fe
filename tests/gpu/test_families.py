"""Families on a GPU: experts, windows, soft caps and blocks give transformers' greedy tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Mamba2Config,
    MambaConfig,
    Qwen3MoeConfig,
)

from llmfw import LLM, SamplingParams
from parity import NORMALISES_GROUPS, random_prompts, tiny_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
VOCAB = 512
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
NEOX = {name: size for name, size in BASE.items() if name != "num_key_value_heads"}
WINDOW = {"head_dim": 128, "sliding_window": 40}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
STATE = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 3, "eos_token_id": None}
LATENT = {
    **BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
MODELS = {
    "DeepseekV2ForCausalLM": DeepseekV2Config(**LATENT, q_lora_rank=None),
    "DeepseekV3ForCausalLM": DeepseekV3Config(**LATENT, q_lora_rank=64, n_group=4, topk_group=2),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=128, norm_topk_prob=True),
    "Gemma2ForCausalLM": Gemma2Config(**BASE, **WINDOW),
    "Gemma3ForCausalLM": Gemma3TextConfig(**BASE, **WINDOW, sliding_window_pattern=2),
    "GPT2LMHeadModel": GPT2Config(
        vocab_size=VOCAB, n_embd=256, n_layer=3, n_head=4, n_positions=512, eos_token_id=None
    ),
    "GPTNeoXForCausalLM": GPTNeoXConfig(**NEOX),
    "GptOssForCausalLM": GptOssConfig(
        **BASE, head_dim=64, num_local_experts=16, num_experts_per_tok=4, sliding_window=40
    ),
    "MambaForCausalLM": MambaConfig(**STATE),
    "Mamba2ForCausalLM": Mamba2Config(
        **STATE, num_heads=8, head_dim=64, n_groups=1 + NORMALISES_GROUPS
    ),
}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def gaps(judge: torch.nn.Module, prompt: list[int], got: list[int], by: Any = None) -> list[float]:
    """How far below the judge's best each token is; `by` chooses anew after each prefix."""
    ids = torch.tensor([[*prompt, *got]], device="cuda")
    with torch.no_grad():
        logits = judge(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = ids[0, len(prompt) :] if by is None else by(ids).logits[0].argmax(-1)
    if by is not None:
        chosen = chosen[len(prompt) - 1 : -1]
    return (logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]).tolist()


def answers(folder: Path, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    """Ours, through the engine with its kernels and graphs."""
    llm = LLM(folder, skip_tokenizer_init=True, device="cuda", dtype=dtype, max_num_seqs=16)
    with llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY)]


@pytest.fixture(params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> torch.nn.Module:
    """Transformers' model on the GPU in float32, saved in tmp_path; its values fit bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    hf = tiny_hf(MODELS[request.param], request.param, "eager")
    for parameter in hf.parameters():
        parameter.data = parameter.data.bfloat16().float()
    hf.save_pretrained(tmp_path)
    return hf.to("cuda")


def test_float32_tokens_are_transformers(reference: torch.nn.Module, tmp_path: Path):
    prompts = random_prompts(12, VOCAB, 1, 200)
    for prompt, got in zip(prompts, answers(tmp_path, prompts, "float32"), strict=True):
        assert max(gaps(reference, prompt, got)) < 1e-3


def test_bfloat16_tokens_are_as_good_as_transformers_own(
    reference: torch.nn.Module, tmp_path: Path
):
    """Judged by float32: rounding may choose another expert, which moves logits far, in both."""
    rounded = copy.deepcopy(reference).to(torch.bfloat16)
    prompts = random_prompts(12, VOCAB, 1, 200)
    ours: list[float] = []
    theirs: list[float] = []
    for prompt, got in zip(prompts, answers(tmp_path, prompts, "bfloat16"), strict=True):
        ours += gaps(reference, prompt, got)
        theirs += gaps(reference, prompt, got, by=rounded)
    mean_ours, mean_theirs = sum(ours) / len(ours), sum(theirs) / len(theirs)
    print(f"mean gap: ours {mean_ours:.4f}, transformers' {mean_theirs:.4f}")
    assert mean_ours < 1.5 * mean_theirs + 0.01
