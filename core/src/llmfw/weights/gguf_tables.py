"""GGUF's format tables: how ggml's names, layouts and pre-tokenizers read in HF's words.

The one file of the core that names models, because the format does: `general.architecture` and
`tokenizer.ggml.pre` are names of models. Adding a family is adding a row here.

Sources: llama.cpp's `convert_hf_to_gguf.py` and `src/llama-vocab.cpp` (pre-tokenizers), the `gguf`
package's `tensor_mapping.py`, transformers' `integrations/ggml.py` (config keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

# Values of `tokenizer.ggml.model`, and what `tokenizer.ggml.pre` means where it is left out.
BYTE_LEVEL = "gpt2"
SENTENCEPIECE = "llama"
DEFAULT_PRE = "gpt-2"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BLOCK = {
    **_ATTENTION,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **_MLP,
}
_SANDWICH = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_STACKED = {
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_EXPERTS = {**_BLOCK, "ffn_gate_inp": "mlp.gate", **_STACKED}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_LATENT = {
    **_BLOCK,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **_STACKED,
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# gpt-oss: a key with its ending stands for a name that HF has without one.
_SINKS = {
    **_ATTENTION,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    **_STACKED,
}
_PHI2 = {
    **_ATTENTION,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_PHI3 = {**_BLOCK, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_TOP = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_STATE = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}
# The second Mamba has the bias of a step size without the product.
_STATE_2 = {**_STATE, "ssm_dt.bias": "mixer.dt_bias"}
_STATE_TOP = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}

# Metadata key (after "<architecture>.") -> config key.
_SIZE_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_KEYS = {
    **_SIZE_KEYS,
    "rope.freq_base": "rope_theta",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_LAYER_NORM_KEYS = {
    **_SIZE_KEYS,
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_STATE_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
}
_CHANNEL_KEYS = {"ssm.inner_size": "intermediate_size", "ssm.time_step_rank": "time_step_rank"}
_HEAD_KEYS = {"ssm.group_count": "n_groups", "ssm.time_step_rank": "num_heads"}
_EXPAND = {"expand": ("ssm.inner_size", "embedding_length")}
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LOCAL_EXPERT_KEYS = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_SHARED_KEYS = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_LATENT_KEYS = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ORIGINAL = {"rope.scaling.original_context_length": "original_max_position_embeddings"}


@dataclass(frozen=True)
class Family:
    """One value of `general.architecture`.

    Args:
        architecture: The HF architecture that serves it.
        model_type: Its `model_type` in HF's config.
        top: Stem of a tensor outside the layers -> HF's stem.
        block: Stem after "blk.N." -> stem after HF's layer; a key may have its ending, and then
            the value is all that HF has.
        layer: What HF has for "blk".
        permuted_heads: q and k rows are stored in pairs (ggml's "normal" rope) and are put back in
            halves.
        qkv_by_head: HF has the rows of a fused q, k, v head by head; ggml all of q, of k, of v.
        transposed: Stems after "blk.N." whose matrices HF has as [in, out].
        joined: What HF has in one after "blk.N.", head by head, and ggml in two, [heads, in, out]
            and [heads, out, in].
        norm_offset: What ggml has added to every norm weight.
        flat: Stems after "blk.N." that HF has with one dimension.
        taps: Stems whose matrices [channels, K] HF has as [channels, 1, K].
        exponents: Stems that ggml has as minus e to the power of HF's.
        float32: Stems that stay float32 when a file is unpacked.
        config_keys: Metadata keys and their names in the config.
        quotients: Config keys that are one metadata key divided by another.
        config: Config entries that the metadata has no key for, or lacks at times.
        grouped: The same where the metadata count groups of experts.
        rope: The same of `rope_scaling`.
        rotary_part: The config's name for the part of a head that rope turns; None: all of it.
    """

    architecture: str
    model_type: str
    top: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_TOP))
    block: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_BLOCK))
    layer: str = "model.layers"
    permuted_heads: bool = False
    qkv_by_head: bool = False
    transposed: frozenset[str] = frozenset()
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    norm_offset: float = 0.0
    flat: frozenset[str] = frozenset()
    taps: frozenset[str] = frozenset()
    exponents: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()
    config_keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_KEYS))
    quotients: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    grouped: Mapping[str, object] = field(default_factory=dict)
    rope: Mapping[str, object] = field(default_factory=dict)
    rotary_part: str | None = None


_SILU = {"hidden_act": "silu"}
_MAMBA = Family(
    "MambaForCausalLM",
    "mamba",
    top=_STATE_TOP,
    block=_STATE,
    layer="backbone.layers",
    taps=frozenset({"ssm_conv1d"}),
    exponents=frozenset({"ssm_a"}),
    float32=frozenset({"ssm_a", "ssm_d", "ssm_dt"}),
    config_keys=_STATE_KEYS | _CHANNEL_KEYS,
    quotients=_EXPAND,
    config=_SILU,
)
_DEEPSEEK = Family(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    block=_LATENT,
    joined={"self_attn.kv_b_proj": ("attn_k_b", "attn_v_b")},
    float32=frozenset({"exp_probs_b"}),
    config_keys=_KEYS | _LATENT_KEYS,
    config={
        **_SILU,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
    },
    grouped={"topk_method": "group_limited_greedy"},
)
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", permuted_heads=True, config=_SILU),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", config=_SILU),
    "qwen2moe": Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        block=_EXPERTS | _SHARED_EXPERT,
        config_keys=_KEYS | _EXPERT_KEYS | _SHARED_KEYS,
        config=_SILU,
    ),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", config=_SILU),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        block=_EXPERTS,
        config_keys=_KEYS | _EXPERT_KEYS,
        config=_SILU | {"norm_topk_prob": True},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        "gemma",
        norm_offset=1.0,
        config={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        block=_SANDWICH,
        norm_offset=1.0,
        config_keys=_KEYS | _WINDOW | _SOFTCAPS,
        config={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        block=_SANDWICH,
        norm_offset=1.0,
        config_keys=_KEYS | _WINDOW,
        config={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "phi2": Family(
        "PhiForCausalLM",
        "phi",
        top=_TOP | {"output_norm": "model.final_layernorm"},
        block=_PHI2,
        config_keys=_LAYER_NORM_KEYS,
        config={"hidden_act": "gelu_new"},
        rotary_part="partial_rotary_factor",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        block=_PHI3,
        config_keys=_KEYS | _WINDOW | _ORIGINAL,
        config=_SILU,
        rotary_part="partial_rotary_factor",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "gpt2",
        top=_GPT2_TOP,
        block=_GPT2,
        layer="transformer.h",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        config_keys=_GPT2_KEYS,
        config={"activation_function": "gelu_new"},
    ),
    "gptneox": Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        top=_NEOX_TOP,
        block=_NEOX,
        layer="gpt_neox.layers",
        qkv_by_head=True,
        config_keys=_LAYER_NORM_KEYS | {"use_parallel_residual": "use_parallel_residual"},
        config={"hidden_act": "gelu"},
        rotary_part="rotary_pct",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "gpt_oss",
        block=_SINKS,
        config_keys=_KEYS | _LOCAL_EXPERT_KEYS | _WINDOW,
        config=_SILU,
        rope={"truncate": False},
    ),
    "deepseek2": _DEEPSEEK,
    "mamba": _MAMBA,
    "mamba2": replace(
        _MAMBA,
        architecture="Mamba2ForCausalLM",
        model_type="mamba2",
        block=_STATE_2,
        flat=frozenset({"ssm_a", "ssm_d", "ssm_norm"}),
        config_keys=_STATE_KEYS | _HEAD_KEYS,
        quotients=_EXPAND | {"head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    ),
}
# What a row of `FAMILIES` becomes where the metadata count experts.
WITH_EXPERTS: Mapping[str, Family] = {
    "llama": Family(
        "MixtralForCausalLM",
        "mixtral",
        block=_EXPERTS,
        permuted_heads=True,
        config_keys=_KEYS | _LOCAL_EXPERT_KEYS,
        config=_SILU,
    ),
}
# The same where they say that experts are chosen by sigmoid.
WITH_SIGMOID: Mapping[str, Family] = {
    "deepseek2": replace(
        _DEEPSEEK, architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", grouped={}
    ),
}
SIGMOID = 2  # of `expert_gating_func`
# The same where they say that what follows from a token is normalised.
WITH_NORMS: Mapping[str, Family] = {
    "mamba": replace(_MAMBA, architecture="FalconMambaForCausalLM", model_type="falcon_mamba"),
}

# Tensors that are settings rather than weights: they go into the config.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
SETTINGS = frozenset({ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS})
# Matrices of one row, which ggml has as vectors.
ONE_ROW = frozenset({"ffn_gate_inp_shexp"})

# tokenizer.ggml.pre -> the regular expressions that split text, in order; "digits" stands for
# single digits, "bytes" for GPT-2's own expression.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"  # words end where small letters are followed by capitals
_CASED_ENDS = (f"{_CASED}{_UPPER}*{_LOWER}+", f"{_CASED}{_UPPER}+{_LOWER}*")
_CASED_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BYTES, _DIGITS_THEN_BYTES = ("bytes",), ("digits", "bytes")
_THREE_DIGITS = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_ONE_DIGIT = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), _BYTES),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_THEN_BYTES
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _THREE_DIGITS),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _ONE_DIGIT),
    **dict.fromkeys(
        ("gpt-4o", "llama4"),
        (
            "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED_ENDS)
            + rf"|\p{{N}}{{1,3}}|{_CASED_REST}",
        ),
    ),
    "tekken": (rf"{'|'.join(_CASED_ENDS)}|\p{{N}}|{_CASED_REST}",),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _PUNCTUATED),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "digits",
    ),
}
PRE_WITH_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})
PRE_WITH_NFC = frozenset({"qwen2"})
