"""Checkpoints as they are published, in small: config.json, tensor names, shapes, dtypes, shards.

Written by hand after the files that people download, not with transformers, whose names in memory
and on disk differ from them here and there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from published_latent import LATENT_LAYOUTS
from published_mxfp4 import MXFP4_LAYOUTS
from published_parts import (
    EXPERTS,
    FOUR_NORMS,
    GATED,
    HEAD,
    LAYERS,
    NORMS,
    NUMBERED,
    QK_NORM,
    QKV_BIAS,
    QKVO,
    RMS,
    SIZES,
    TOP,
    D,
    H,
    Layout,
    M,
    V,
    biased,
    weights,
)

MIXTRAL = {
    f"block_sparse_moe.experts.{expert}.{name}.weight": shape
    for expert in range(EXPERTS)
    for name, shape in {"w1": (M, H), "w2": (H, M), "w3": (M, H)}.items()
}
VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14),
    "vision_tower.vision_model.embeddings.position_embedding.weight": (4, 16),
    "vision_tower.vision_model.post_layernorm.weight": (16,),
    "multi_modal_projector.mm_input_projection_weight": (16, H),
    "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
}
GPT2_LAYER = {
    **biased(weights(ln_1=(H,), ln_2=(H,))),
    "attn.bias": (1, 1, 64, 64),
    "attn.c_attn.weight": (H, 3 * H),
    "attn.c_attn.bias": (3 * H,),
    "attn.c_proj.weight": (H, H),
    "attn.c_proj.bias": (H,),
    "mlp.c_fc.weight": (H, 4 * H),
    "mlp.c_fc.bias": (4 * H,),
    "mlp.c_proj.weight": (4 * H, H),
    "mlp.c_proj.bias": (H,),
}
NEOX_LAYER = {
    **biased(NORMS),
    **biased(weights(attention__query_key_value=(3 * H, H), attention__dense=(H, H))),
    **biased(weights(mlp__dense_h_to_4h=(M, H), mlp__dense_4h_to_h=(H, M))),
    "attention.bias": (1, 1, 64, 64),
    "attention.masked_bias": (),
    "attention.rotary_emb.inv_freq": (1,),
}
PHI_LAYER = biased(
    {
        **weights(input_layernorm=(H,), mlp__fc1=(M, H), mlp__fc2=(H, M), self_attn__dense=(H, H)),
        **{f"self_attn.{x}_proj.weight": (H, H) for x in "qkv"},
    }
)
PHI3_LAYER = {
    **NORMS,
    "self_attn.qkv_proj.weight": (8 * D, H),
    "self_attn.o_proj.weight": (H, 4 * D),
    "mlp.gate_up_proj.weight": (2 * M, H),
    "mlp.down_proj.weight": (H, M),
}
OPT_LAYER = biased(
    {
        **{f"self_attn.{x}_proj.weight": (H, H) for x in ("k", "v", "q", "out")},
        **weights(self_attn_layer_norm=(H,), fc1=(M, H), fc2=(H, M), final_layer_norm=(H,)),
    }
)
GEMMA = {"head_dim": D, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
GEMMA3 = {
    **{name: value for name, value in SIZES.items() if name != "rope_theta"},
    "head_dim": D,
    "model_type": "gemma3_text",
    "sliding_window": 16,
}
NEOX_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
MASKS = tuple(f"h.{i}.attn.bias" for i in range(LAYERS))
NEOX_MASKS = tuple(
    f"gpt_neox.layers.{i}.attention.{name}"
    for i in range(LAYERS)
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
)

MAMBA_SIZES = {
    "hidden_size": H,
    "vocab_size": V,
    "num_hidden_layers": LAYERS,
    "state_size": 4,
    "conv_kernel": 4,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-05,
}
MAMBA_TOP = weights(backbone__embeddings=(V, H), backbone__norm_f=(H,))
MAMBA_LAYER = {
    **weights(
        norm=(H,),
        mixer__conv1d=(2 * H, 1, 4),
        mixer__in_proj=(4 * H, H),
        mixer__x_proj=(2 + 2 * 4, 2 * H),
        mixer__dt_proj=(2 * H, 2),
        mixer__out_proj=(H, 2 * H),
    ),
    "mixer.conv1d.bias": (2 * H,),
    "mixer.dt_proj.bias": (2 * H,),
    "mixer.A_log": (2 * H, 4),
    "mixer.D": (2 * H,),
}
MAMBA2_LAYER = {  # 8 heads of 8 features, 2 groups
    **weights(
        norm=(H,),
        mixer__conv1d=(2 * H + 2 * 2 * 4, 1, 4),
        mixer__in_proj=(4 * H + 2 * 2 * 4 + 8, H),
        mixer__norm=(2 * H,),
        mixer__out_proj=(H, 2 * H),
    ),
    "mixer.conv1d.bias": (2 * H + 2 * 2 * 4,),
    "mixer.dt_bias": (8,),
    "mixer.A_log": (8,),
    "mixer.D": (8,),
}

LAYOUTS: dict[str, Layout] = {
    "MambaForCausalLM": Layout(
        {
            "model_type": "mamba",
            **MAMBA_SIZES,
            "d_model": H,
            "d_inner": 2 * H,
            "n_layer": LAYERS,
            "intermediate_size": 2 * H,
            "expand": 2,
            "time_step_rank": 2,
            "rms_norm": True,
            "fused_add_norm": True,
            "ssm_cfg": {},
        },
        MAMBA_TOP,
        MAMBA_LAYER,
        prefix="backbone.layers.{i}.",
        dtype=torch.float32,
    ),
    "FalconMambaForCausalLM": Layout(
        {
            "model_type": "falcon_mamba",
            **MAMBA_SIZES,
            "intermediate_size": 2 * H,
            "expand": 16,  # as published; intermediate_size is what counts
            "time_step_rank": 2,
            "mixer_rms_eps": 1e-06,
            "tie_word_embeddings": False,
        },
        {**MAMBA_TOP, **HEAD},
        MAMBA_LAYER,
        prefix="backbone.layers.{i}.",
    ),
    "Mamba2ForCausalLM": Layout(
        {
            "model_type": "mamba2",
            **MAMBA_SIZES,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 256,
            "norm_before_gate": True,
            "rms_norm": True,
            "time_step_limit": [0.0, float("inf")],
            "time_step_rank": 2,
            "tie_word_embeddings": False,
        },
        {**MAMBA_TOP, **HEAD},
        MAMBA2_LAYER,
        prefix="backbone.layers.{i}.",
    ),
    "LlamaForCausalLM": Layout(
        {"model_type": "llama", **SIZES, **RMS}, {**TOP, **HEAD}, {**QKVO, **GATED, **NORMS}
    ),
    "MistralForCausalLM": Layout(
        {"model_type": "mistral", **SIZES, **RMS, "sliding_window": 16},
        {**TOP, **HEAD},
        {**QKVO, **GATED, **NORMS},
    ),
    "Qwen2ForCausalLM": Layout(
        {"model_type": "qwen2", **SIZES, **RMS, "tie_word_embeddings": True},
        TOP,
        {**QKVO, **QKV_BIAS, **GATED, **NORMS},
    ),
    "Qwen3ForCausalLM": Layout(
        {"model_type": "qwen3", **SIZES, **RMS, "head_dim": D},
        {**TOP, **HEAD},
        {**QKVO, **QK_NORM, **GATED, **NORMS},
    ),
    "Qwen2MoeForCausalLM": Layout(
        {
            "model_type": "qwen2_moe",
            **SIZES,
            **RMS,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": M,
            "shared_expert_intermediate_size": 2 * M,
        },
        {**TOP, **HEAD},
        {
            **QKVO,
            **QKV_BIAS,
            **NUMBERED,
            **NORMS,
            **weights(mlp__gate=(EXPERTS, H), mlp__shared_expert_gate=(1, H)),
            **weights(mlp__shared_expert__gate_proj=(2 * M, H)),
            **weights(mlp__shared_expert__up_proj=(2 * M, H)),
            **weights(mlp__shared_expert__down_proj=(H, 2 * M)),
        },
    ),
    "Qwen3MoeForCausalLM": Layout(
        {
            "model_type": "qwen3_moe",
            **SIZES,
            **RMS,
            "head_dim": D,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": M,
            "norm_topk_prob": True,
        },
        {**TOP, **HEAD},
        {**QKVO, **QK_NORM, **NUMBERED, **NORMS, **weights(mlp__gate=(EXPERTS, H))},
    ),
    "MixtralForCausalLM": Layout(
        {"model_type": "mixtral", **SIZES, **RMS, "num_local_experts": EXPERTS},
        {**TOP, **HEAD},
        {**QKVO, **NORMS, **MIXTRAL, **weights(block_sparse_moe__gate=(EXPERTS, H))},
    ),
    **LATENT_LAYOUTS,
    **MXFP4_LAYOUTS,
    "GemmaForCausalLM": Layout(
        {"model_type": "gemma", **SIZES, **GEMMA}, TOP, {**QKVO, **GATED, **NORMS}
    ),
    "Gemma2ForCausalLM": Layout(
        {"model_type": "gemma2", **SIZES, **GEMMA, "sliding_window": 16},
        TOP,
        {**QKVO, **GATED, **FOUR_NORMS},
    ),
    "Gemma3ForCausalLM": Layout(
        {**GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2},
        TOP,
        {**QKVO, **QK_NORM, **GATED, **FOUR_NORMS},
    ),
    "Gemma3ForConditionalGeneration": Layout(
        {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {"hidden_size": 16}},
        {**{f"language_model.{name}": shape for name, shape in TOP.items()}, **VISION},
        {**QKVO, **QK_NORM, **GATED, **FOUR_NORMS},
        prefix="language_model.model.layers.{i}.",
        ignored=tuple(VISION),
    ),
    "PhiForCausalLM": Layout(
        {
            "model_type": "phi",
            **SIZES,
            "num_key_value_heads": None,
            "partial_rotary_factor": 0.5,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
        },
        {
            **weights(model__embed_tokens=(V, H)),
            **biased({**weights(model__final_layernorm=(H,)), **HEAD}),
        },
        PHI_LAYER,
        dtype=torch.float16,
    ),
    "Phi3ForCausalLM": Layout(
        {"model_type": "phi3", **SIZES, **RMS, "sliding_window": 16, "pad_token_id": 1},
        {**TOP, **HEAD},
        PHI3_LAYER,
    ),
    "OPTForCausalLM": Layout(
        {
            "model_type": "opt",
            "hidden_size": H,
            "word_embed_proj_dim": H,
            "ffn_dim": M,
            "vocab_size": V,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
            "activation_function": "relu",
        },
        {
            **weights(model__decoder__embed_tokens=(V, H), lm_head=(V, H)),
            **weights(model__decoder__embed_positions=(66, H)),
            **biased(weights(model__decoder__final_layer_norm=(H,))),
        },
        OPT_LAYER,
        prefix="model.decoder.layers.{i}.",
        dtype=torch.float16,
        ignored=("lm_head.weight",),
    ),
    "GPT2LMHeadModel": Layout(
        {
            "model_type": "gpt2",
            "n_embd": H,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_ctx": 64,
            "n_positions": 64,
            "vocab_size": V,
        },
        {**weights(wte=(V, H), wpe=(64, H)), **biased(weights(ln_f=(H,)))},
        GPT2_LAYER,
        prefix="h.{i}.",
        dtype=torch.float32,
        ignored=MASKS,
    ),
    "GPTNeoXForCausalLM": Layout(
        {
            "model_type": "gpt_neox",
            **{name: size for name, size in SIZES.items() if name in NEOX_SIZES},
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
        },
        {
            **weights(gpt_neox__embed_in=(V, H), embed_out=(V, H)),
            **biased(weights(gpt_neox__final_layer_norm=(H,))),
        },
        NEOX_LAYER,
        prefix="gpt_neox.layers.{i}.",
        dtype=torch.float16,
        ignored=NEOX_MASKS,
    ),
}


def write(architecture: str, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """config.json, and `tensors` in two shards with their index."""
    layout = LAYOUTS[architecture]
    config = {"architectures": [architecture], **layout.config}
    config["torch_dtype"] = str(layout.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    shards = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    index: dict[str, str] = {}
    for number, held in shards.items():
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file)
        index |= dict.fromkeys(held, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def tensors_of(architecture: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, random."""
    layout = LAYOUTS[architecture]
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(layout.dtype_of(name))
        for name, shape in layout.shapes().items()
    }
