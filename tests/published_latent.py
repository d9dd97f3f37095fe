"""Published checkpoints with multi-head latent attention: V2-Lite and V3 of DeepSeek, in small."""

from __future__ import annotations

import torch

from published_parts import (
    EXPERTS,
    GATED,
    HEAD,
    LAYERS,
    NORMS,
    NUMBERED,
    RMS,
    SIZES,
    TOP,
    D,
    H,
    Layout,
    M,
    V,
    weights,
)

RANK, Q_RANK, NOPE, ROPE = 12, 10, 8, 4  # of latents and of compressed queries; parts of a head
MLA_SIZES = {
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": D,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": M,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "attention_bias": False,
}
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
LATENT = weights(
    self_attn__kv_a_proj_with_mqa=(RANK + ROPE, H),
    self_attn__kv_a_layernorm=(RANK,),
    self_attn__kv_b_proj=(4 * (NOPE + D), RANK),
    self_attn__o_proj=(H, 4 * D),
)
PLAIN_QUERY = weights(self_attn__q_proj=(4 * (NOPE + ROPE), H))
LOW_RANK_QUERY = weights(
    self_attn__q_a_proj=(Q_RANK, H),
    self_attn__q_a_layernorm=(Q_RANK,),
    self_attn__q_b_proj=(4 * (NOPE + ROPE), Q_RANK),
)
SHARED_EXPERTS = {
    f"mlp.shared_experts.{name}.weight": shape
    for name, shape in {
        "gate_proj": (2 * M, H),
        "up_proj": (2 * M, H),
        "down_proj": (H, 2 * M),
    }.items()
}
DEEPSEEK_EXPERTS = {**NUMBERED, **SHARED_EXPERTS, **weights(mlp__gate=(EXPERTS, H))}
V3_LAYER = {
    **LATENT,
    **LOW_RANK_QUERY,
    **NORMS,
    **DEEPSEEK_EXPERTS,
    "mlp.gate.e_score_correction_bias": (EXPERTS,),
}
NEXT_TOKENS = {
    **V3_LAYER,
    **weights(embed_tokens=(V, H), enorm=(H,), hnorm=(H,), eh_proj=(H, 2 * H)),
    **weights(shared_head__norm=(H,), shared_head__head=(V, H)),
}

LATENT_LAYOUTS: dict[str, Layout] = {
    "DeepseekV2ForCausalLM": Layout(
        {
            "model_type": "deepseek_v2",
            **SIZES,
            **RMS,
            **MLA_SIZES,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {**TOP, **HEAD},
        {**LATENT, **PLAIN_QUERY, **NORMS, **DEEPSEEK_EXPERTS},
        others={0: {**LATENT, **PLAIN_QUERY, **NORMS, **GATED}},
    ),
    "DeepseekV3ForCausalLM": Layout(
        {
            "model_type": "deepseek_v3",
            **SIZES,
            **RMS,
            **MLA_SIZES,
            "q_lora_rank": Q_RANK,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {**TOP, **HEAD},
        V3_LAYER,
        others={0: {**LATENT, **LOW_RANK_QUERY, **NORMS, **GATED}, LAYERS: NEXT_TOKENS},
        dtypes={"e_score_correction_bias": torch.float32},
        ignored=tuple(f"model.layers.{LAYERS}.{name}" for name in NEXT_TOKENS),
    ),
}
