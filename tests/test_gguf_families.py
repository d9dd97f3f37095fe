"""GGUF files of the families give transformers' logits: names by gguf's own tables, not by ours.

Tensors are permuted, transposed and split as llama.cpp's converter does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from gguf_files import TOKENS, to_ggml_pairs, write_gguf
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
    "pad_token_id": None,
}
LAYER_NORM = {name: BASE[name] for name in BASE if name not in ("rms_norm_eps",)}
LAYER_NORM |= {"layer_norm_eps": 1e-3, "num_key_value_heads": 4, "tie_word_embeddings": False}
UNTIED = {"tie_word_embeddings": False}
HEAD, HEAD_KEYS = {"head_dim": 32}, {"attention.key_length": 32}
WINDOW, WINDOW_KEYS = {"sliding_window": 9}, {"attention.sliding_window": 9}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
LOCAL_KEYS = {"expert_count": 6, "expert_used_count": 2}
EXPERT_KEYS = {**LOCAL_KEYS, "expert_feed_forward_length": 24}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
EPS = {"attention.layer_norm_epsilon": 1e-3}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 4 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
STATE: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
STATE_KEYS = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 8}


@dataclass(frozen=True)
class Case:
    """A family's tiny model, and what its GGUF file says of it.

    Args:
        arch: `general.architecture`.
        architecture: HF's.
        config: Of the HF model.
        keys: Metadata, less the sizes that all have, after "<arch>.".
        quantise: ggml's types of tensors whose names end so.
    """

    arch: str
    architecture: str
    config: Any
    keys: dict[str, Any] = field(default_factory=dict)
    quantise: dict[str, str] = field(default_factory=dict)


GPT_OSS = GptOssConfig(
    **{**BASE, **UNTIED, **LOCAL_EXPERTS, **WINDOW, "rope_parameters": {**YARN, "truncate": False}},
    head_dim=16,
)
GPT_OSS_KEYS = {**LOCAL_KEYS, **WINDOW_KEYS, **YARN_KEYS, "expert_feed_forward_length": 96}
CASES: dict[str, Case] = {
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", Qwen2Config(**BASE)),
    "qwen2moe": Case(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        Qwen2MoeConfig(**BASE, **EXPERTS, shared_expert_intermediate_size=40),
        {**EXPERT_KEYS, "expert_shared_feed_forward_length": 40},
    ),
    "qwen3moe": Case(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        Qwen3MoeConfig(**BASE, **HEAD, **EXPERTS, norm_topk_prob=True),
        HEAD_KEYS | EXPERT_KEYS,
    ),
    "mixtral": Case(
        "llama",
        "MixtralForCausalLM",
        MixtralConfig(**{**BASE, **UNTIED}, **LOCAL_EXPERTS),
        LOCAL_KEYS,
    ),
    "gemma": Case("gemma", "GemmaForCausalLM", GemmaConfig(**BASE, **HEAD), HEAD_KEYS),
    "gemma2": Case(
        "gemma2",
        "Gemma2ForCausalLM",
        Gemma2Config(**BASE, **HEAD, **WINDOW),
        HEAD_KEYS | WINDOW_KEYS | CAPS,
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3ForCausalLM",
        Gemma3TextConfig(**BASE, **HEAD, **WINDOW),
        HEAD_KEYS | WINDOW_KEYS,
    ),
    "phi2": Case(
        "phi2",
        "PhiForCausalLM",
        PhiConfig(**LAYER_NORM, partial_rotary_factor=0.5),
        {**EPS, "attention.head_count_kv": 4, "rope.dimension_count": 8},
    ),
    "phi3": Case(
        "phi3", "Phi3ForCausalLM", Phi3Config(**{**BASE, **UNTIED}, **WINDOW), WINDOW_KEYS
    ),
    "phi3_long": Case(
        "phi3",
        "Phi3ForCausalLM",
        Phi3Config(
            **{**BASE, **UNTIED},
            rope_parameters=LONGROPE,
            original_max_position_embeddings=32,
        ),
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "gpt2": Case(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2Config(
            vocab_size=len(TOKENS),
            n_embd=64,
            n_inner=96,
            n_layer=2,
            n_head=4,
            n_positions=64,
            layer_norm_epsilon=1e-3,
            eos_token_id=None,
            bos_token_id=None,
        ),
        EPS,
    ),
    "gptneox": Case(
        "gptneox",
        "GPTNeoXForCausalLM",
        GPTNeoXConfig(**LAYER_NORM, rotary_pct=0.5),
        {**EPS, "rope.dimension_count": 8, "use_parallel_residual": True},
    ),
    "gptneox_sequential": Case(
        "gptneox",
        "GPTNeoXForCausalLM",
        GPTNeoXConfig(**LAYER_NORM, rotary_pct=0.25, use_parallel_residual=False),
        {**EPS, "rope.dimension_count": 4, "use_parallel_residual": False},
    ),
    "gpt-oss": Case(
        "gpt-oss", "GptOssForCausalLM", GPT_OSS, {**GPT_OSS_KEYS, "attention.key_length": 16}
    ),
    "gpt-oss_mxfp4": Case(
        "gpt-oss",
        "GptOssForCausalLM",
        GPT_OSS,
        {**GPT_OSS_KEYS, "attention.key_length": 16},
        quantise={"_exps.weight": "MXFP4"},
    ),
    "mamba": Case(
        "mamba",
        "MambaForCausalLM",
        MambaConfig(**STATE, time_step_rank=5),
        {**STATE_KEYS, "ssm.time_step_rank": 5, "ssm.dt_b_c_rms": False},
    ),
    "falcon_mamba": Case(
        "mamba",
        "FalconMambaForCausalLM",
        FalconMambaConfig(**STATE, tie_word_embeddings=False),
        {**STATE_KEYS, "ssm.time_step_rank": 4, "ssm.dt_b_c_rms": True},
    ),
    "mamba2": Case(
        "mamba2",
        "Mamba2ForCausalLM",
        Mamba2Config(**STATE, num_heads=8, head_dim=16, n_groups=2),
        {**STATE_KEYS, "ssm.time_step_rank": 8, "ssm.group_count": 2},
    ),
}


LATENT = {
    **BASE,
    **UNTIED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}
LATENT_KEYS = {
    **YARN_KEYS,
    "rope.scaling.yarn_log_multiplier": 0.0707,
    "rope.dimension_count": 8,
    "attention.kv_lora_rank": 24,
    "leading_dense_block_count": 1,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 24,
}
HEADS = {"attention.key_length": 24, "attention.value_length": 12, "attention.head_count_kv": 4}
LATENT_HEADS = {
    "attention.key_length": 32,
    "attention.value_length": 24,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 12,
    "attention.head_count_kv": 1,
}
GROUPS, GROUP_KEYS = (
    {"n_group": 4, "topk_group": 2},
    {"expert_group_count": 4, "expert_group_used_count": 2},
)
V3 = DeepseekV3Config(
    **{**LATENT, **GROUPS, "q_lora_rank": 20}, routed_scaling_factor=2.5, norm_topk_prob=True
)
V3_KEYS = {
    **LATENT_KEYS,
    **LATENT_HEADS,
    **GROUP_KEYS,
    "attention.q_lora_rank": 20,
    "expert_gating_func": 2,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
}
CASES |= {
    "deepseek2": Case(
        "deepseek2", "DeepseekV2ForCausalLM", DeepseekV2Config(**LATENT), LATENT_KEYS | LATENT_HEADS
    ),
    "deepseek2_older": Case(
        "deepseek2", "DeepseekV2ForCausalLM", DeepseekV2Config(**LATENT), LATENT_KEYS | HEADS
    ),
    "deepseek2_groups": Case(
        "deepseek2",
        "DeepseekV2ForCausalLM",
        DeepseekV2Config(**LATENT, **GROUPS, topk_method="group_limited_greedy"),
        LATENT_KEYS | LATENT_HEADS | GROUP_KEYS,
    ),
    "deepseek2_v3": Case("deepseek2", "DeepseekV3ForCausalLM", V3, V3_KEYS),
}


def converted(case: Case, hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as llama.cpp's converter writes them."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(number, 2)
    tensors = {}
    for name, value in rearranged(case, published(hf)):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = value.contiguous()
    factors = getattr(hf.config, "rope_parameters", None) or {}
    for kind in ("long", "short"):
        if factors.get(f"{kind}_factor"):
            tensors[f"rope_factors_{kind}.weight"] = torch.tensor(factors[f"{kind}_factor"])
    return tensors


def rearranged(case: Case, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What the converter does to values and names before it looks the names up."""
    heads = 4
    for name, value in tensors.items():
        if case.arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if case.arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = to_ggml_pairs(value, heads if "q_proj" in name else 2)
        if case.arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()
        if "query_key_value" in name:
            by_head = value.reshape(heads, 3, 64 // heads, *value.shape[1:])
            value = torch.cat([by_head[:, part].flatten(0, 1) for part in range(3)])
        if name.endswith("A_log"):
            value = -torch.exp(value)
        if name.endswith("conv1d.weight"):
            value = value.squeeze(1)
        if case.arch == "mamba2" and name.endswith(("A_log", ".D")):
            value = value[:, None]
        if name.endswith("mixer.norm.weight"):
            value = value.unflatten(0, (2, -1))
        name = name.replace("mixer.dt_bias", "mixer.dt_proj.bias")
        if name.endswith("shared_expert_gate.weight"):
            value = value.squeeze()
        if name.endswith("kv_b_proj.weight") and "attention.key_length_mla" in case.keys:
            first, second = value.view(heads, -1, value.shape[-1]).split([16, 12], dim=1)
            yield name.replace("kv_b", "k_b"), first.transpose(1, 2)
            yield name.replace("kv_b", "v_b"), second
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        yield (f"{name}.weight" if name.endswith("sinks") else name), value


def published(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with its experts' products apart and the tied head left out."""
    tensors = {}
    alternating = hf.config.model_type == "gpt_oss"
    for name, value in hf.state_dict().items():
        stem, _, last = name.rpartition(".")
        if "experts.gate_up_proj" in name:
            ending = ".bias" if last.endswith("_bias") else ".weight"
            if alternating:
                value = value if ending == ".bias" else value.transpose(1, 2)
                gate, up = value[:, ::2], value[:, 1::2]
            else:
                gate, up = value.chunk(2, dim=1)
            tensors |= {f"{stem}.gate_proj{ending}": gate, f"{stem}.up_proj{ending}": up}
        elif name.endswith("experts.down_proj_bias"):
            tensors[f"{stem}.down_proj.bias"] = value
        elif name.endswith("experts.down_proj"):
            tensors[f"{name}.weight"] = value.transpose(1, 2) if alternating else value
        elif name != "lm_head.weight" or not hf.config.tie_word_embeddings:
            tensors[name] = value
    return tensors


def round_experts(hf: torch.nn.Module) -> None:
    """Make the experts' matrices what their MXFP4 blocks say."""
    kind = gguf.GGMLQuantizationType.MXFP4
    for name, value in hf.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks = gguf.quantize(value.detach().transpose(1, 2).contiguous().numpy(), kind)
            value.data = torch.from_numpy(gguf.dequantize(blocks, kind)).transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_gives_transformers_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))
    case = CASES[name]
    hf = tiny_hf(case.config, case.architecture, "eager")
    for parameter in hf.parameters():  # unpacked files of this size are kept in bfloat16
        parameter.data = parameter.data.bfloat16().float()
    for buffer_name, buffer in hf.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):  # zero in a new model
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    if case.quantise:
        round_experts(hf)
    tensors = converted(case, hf)
    file = write_gguf(
        tmp_path / "x.gguf",
        tensors,
        arch=case.arch,
        metadata={f"{case.arch}.{key}": value for key, value in case.keys.items()},
        quantise={
            tensor: kind
            for tensor in tensors
            for end, kind in case.quantise.items()
            if tensor.endswith(end)
        },
    )
    loaded = load_model(file, dtype="float32", kernels="reference", block_size=4)
    assert loaded.model_config.pretrained_config.architectures == [case.architecture]
    for ids in random_prompts(2, len(TOKENS), 34, 60):  # longer than the original length
        got = PackedSession(loaded.model).step({"a": ids})["a"]
        torch.testing.assert_close(got, hf_logits(hf, ids), atol=ATOL, rtol=0)
