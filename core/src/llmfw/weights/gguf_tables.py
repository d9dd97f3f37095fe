"""GGUF's format tables: how ggml's names, layouts and pre-tokenizers read in HF's words.

The one file of the core that names models, because the format does: `general.architecture` and
`tokenizer.ggml.pre` are names of models. Adding a family is adding a row here.

Sources: llama.cpp's `convert_hf_to_gguf.py` and `src/llama-vocab.cpp` (pre-tokenizers), the `gguf`
package's `tensor_mapping.py`, transformers' `integrations/ggml.py` (config keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Values of `tokenizer.ggml.model`, and what `tokenizer.ggml.pre` means where it is left out.
BYTE_LEVEL = "gpt2"
SENTENCEPIECE = "llama"
DEFAULT_PRE = "gpt-2"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    **_BLOCK,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Metadata key (after "<architecture>.") -> config key, for every family.
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True)
class Family:
    """One value of `general.architecture`.

    Args:
        architecture: The HF architecture that serves it.
        model_type: Its `model_type` in HF's config.
        block: Stem after "blk.N." -> stem after "model.layers.N.".
        permuted_heads: q and k rows are stored in pairs (ggml's "normal" rope) and are put back in
            halves.
        norm_offset: What ggml has added to every norm weight.
        config_keys: Metadata keys of this family alone.
        config: Fixed config entries that the metadata has no key for.
    """

    architecture: str
    model_type: str
    block: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_BLOCK))
    permuted_heads: bool = False
    norm_offset: float = 0.0
    config_keys: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", "llama", permuted_heads=True, config={"hidden_act": "silu"}
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", config={"hidden_act": "silu"}),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", config={"hidden_act": "silu"}),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        block=_EXPERTS,
        config_keys=_EXPERT_KEYS,
        config={"hidden_act": "silu", "norm_topk_prob": True},
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
        config_keys=_WINDOW | _SOFTCAPS,
        config={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        block=_SANDWICH,
        norm_offset=1.0,
        config_keys=_WINDOW,
        config={"hidden_activation": "gelu_pytorch_tanh"},
    ),
}

TOP_NAMES: Mapping[str, str] = _TOP
# Tensors that are settings rather than weights: they go into the config.
ROPE_FACTORS = "rope_freqs.weight"

# tokenizer.ggml.pre -> the regular expressions that split text, in order; "digits" stands for
# single digits, "bytes" for GPT-2's own expression.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_THEN_BYTES = ("digits", "bytes")
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": ("bytes",),
    "smollm": _DIGITS_THEN_BYTES,
    "starcoder": _DIGITS_THEN_BYTES,
    "refact": _DIGITS_THEN_BYTES,
    "command-r": _DIGITS_THEN_BYTES,
    "codeshell": _DIGITS_THEN_BYTES,
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",),
}
PRE_WITH_BOS = frozenset({"llama-bpe"})
PRE_WITH_NFC = frozenset({"qwen2"})
