"""gpt-oss's published checkpoints in small: experts in MXFP4, and the same in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from published_parts import EXPERTS, HEAD, LAYERS, NORMS, QKVO, SIZES, TOP, D, H, Layout, biased

WIDE = 64  # of an expert: blocks have 32 elements
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    **{name: size for name, size in SIZES.items() if name != "rope_theta"},
    "intermediate_size": WIDE,
    "head_dim": D,
    "attention_bias": True,
    "hidden_act": "silu",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initial_context_length": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_type": "yarn",
        "truncate": False,
    },
    "swiglu_limit": 7.0,
}
NOT_EXPERTS = {
    **biased(QKVO),
    **NORMS,
    "self_attn.sinks": (4,),
    "mlp.router.weight": (EXPERTS, H),
    "mlp.router.bias": (EXPERTS,),
    "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * WIDE),
    "mlp.experts.down_proj_bias": (EXPERTS, H),
}
MXFP4_LAYOUTS: dict[str, Layout] = {
    "GptOssForCausalLM": Layout(
        CONFIG,
        {**TOP, **HEAD},
        {
            **NOT_EXPERTS,
            "mlp.experts.gate_up_proj": (EXPERTS, H, 2 * WIDE),
            "mlp.experts.down_proj": (EXPERTS, WIDE, H),
        },
    )
}
BLOCKED = {
    "gate_up_proj": (EXPERTS, 2 * WIDE, H // 32),
    "down_proj": (EXPERTS, H, WIDE // 32),
}


def blocks_and_scales() -> dict[str, torch.Tensor]:
    """What the published files have in place of the experts' matrices, random."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, shape in BLOCKED.items():
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(256, (*shape, 16), generator=generator)
            scales = torch.randint(121, 124, shape, generator=generator)
            tensors[f"{stem}_blocks"] = blocks.to(torch.uint8)
            tensors[f"{stem}_scales"] = scales.to(torch.uint8)
    return tensors
