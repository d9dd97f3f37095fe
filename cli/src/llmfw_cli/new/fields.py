"""Fields of config.json: which set a switch of the stock decoder, and which nobody looks at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SWITCHES = {  # field -> (switch, expression)
    "attention_multiplier": ("attn_scale", "config.attention_multiplier"),
    "query_pre_attn_scalar": ("attn_scale", "config.query_pre_attn_scalar**-0.5"),
    "attn_logit_softcapping": ("attn_softcap", "config.attn_logit_softcapping"),
    "final_logit_softcapping": ("logit_softcap", "config.final_logit_softcapping"),
    "scale_emb": ("embed_scale", "config.scale_emb"),
    "scale_depth": ("residual_scale", "config.scale_depth / config.num_hidden_layers**0.5"),
    "embedding_multiplier": ("embed_scale", "config.embedding_multiplier"),
    "residual_multiplier": ("residual_scale", "config.residual_multiplier"),
    "logits_scaling": ("logit_scale", "1 / config.logits_scaling"),
    "logit_scale": ("logit_scale", "config.logit_scale"),
}
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim")
PARALLEL = ("use_parallel_residual", "parallel_attn")

# What the stock decoder takes from a configuration, the shapes tell, or no computation needs.
_READ = set(
    """
    architectures model_type torch_dtype dtype transformers_version auto_map _name_or_path
    hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head num_key_value_heads
    head_dim intermediate_size n_inner ffn_dim vocab_size max_position_embeddings n_positions n_ctx
    hidden_act activation_function hidden_activation activation attention_bias mlp_bias
    tie_word_embeddings rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon
    norm_eps norm_epsilon scale_attn_weights
    rope_theta rope_scaling rope_parameters partial_rotary_factor rotary_dim rotary_pct
    rotary_emb_base sliding_window use_sliding_window max_window_layers layer_types
    use_qkv_bias use_bias bias qkv_bias use_qk_norm qk_layernorm
    use_cache initializer_range pretraining_tp is_decoder bos_token_id eos_token_id pad_token_id
    sep_token_id unk_token_id gradient_checkpointing attn_implementation return_dict id2label
    label2id output_attentions output_hidden_states task_specific_params is_encoder_decoder
    add_cross_attention tokenizer_class chunk_size_feed_forward problem_type layerdrop rotary
    original_max_position_embeddings multi_query num_kv_heads n_head_kv num_nextn_predict_layers
    scale_embedding
    kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
""".split()  # noqa: SIM905 - words read better than a list of strings
)
_READ_OF_EXPERTS = set(
    """
    num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_k
    moe_topk moe_top_k moe_intermediate_size norm_topk_prob mlp_only_layers decoder_sparse_step
    first_k_dense_replace router_aux_loss_coef routed_scaling_factor
    moe_layer_freq topk_method scoring_func
""".split()  # noqa: SIM905
)
_IDLE_BEGINNINGS = ("summary_", "_", "initializer_", "use_cache", "output_")
_IDLE_ENDINGS = (
    "dropout",
    "_pdrop",
    "_drop",
    "_std",
    "_token",
    "_token_id",
    "transformers_version",
)


def switches_of(config: Any) -> Iterator[tuple[str, str]]:
    """Switches that fields of a configuration set, with the expressions that read them."""
    for field, (switch, expression) in SWITCHES.items():
        if getattr(config, field, None) is not None:
            yield switch, expression
    if getattr(config, "scale_embedding", False) is True:
        yield "embed_scale", "config.hidden_size**0.5"
    if isinstance(getattr(config, "activation", None), str):
        yield "activation", "config.activation"


def names_activation(config: Any) -> bool:
    """Whether a field names the MLP's activation."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return any(getattr(config, name, None) for name in names)


def tells_of_rope(raw: Mapping[str, Any]) -> bool:
    """Whether a field names a rotary embedding's base, scaling or part of a head."""
    return any(re.search(r"rope|rotary", name) for name in raw)


def width_expression(config: Any, width: int) -> str:
    """How to write a width of the MLP: the field that has it, else the number."""
    for field in WIDTHS:
        if getattr(config, field, None) == width:
            return f"config.{field}"
    return str(width)


def count_expression(config: Any, heads: int) -> str:
    """How to write the number of key heads: the field that has it, else the number."""
    for field in KV_HEADS:
        if getattr(config, field, None) == heads:
            return f"config.{field}"
    return str(heads)


def eps_field(raw: Mapping[str, Any]) -> str | None:
    """The field that has the norms' epsilon."""
    return next((name for name in raw if re.search(r"norm.*eps", name)), None)


def is_parallel(config: Any) -> bool:
    """Whether a field says that attention and MLP stand side by side."""
    return any(getattr(config, field, False) is True for field in PARALLEL)


def shapes_computation(name: str) -> bool:
    """Whether a field may matter to a forward pass: training's and output's do not."""
    return not (name.startswith(_IDLE_BEGINNINGS) or name.endswith(_IDLE_ENDINGS))


def unread(raw: Mapping[str, Any], switches: Mapping[str, str], *, experts: bool) -> dict[str, Any]:
    """Fields that set something and that nothing here looks at.

    Args:
        raw: The contents of config.json.
        switches: The spec's changes, as expressions; a field in them was looked at.
        experts: Whether a mixture of experts was recognised.
    """
    known = {*_READ, *SWITCHES, *PARALLEL, *WIDTHS, *KV_HEADS}
    known |= _READ_OF_EXPERTS if experts else set()
    known |= set(re.findall(r"config\.(\w+)", " ".join(switches.values())))
    return {
        name: value
        for name, value in raw.items()
        if name not in known and shapes_computation(name) and value not in (None, False, [], {}, "")
    }
