"""What a module is for, told from its name: the words that checkpoints use for the same parts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from llmfw_cli.new.tensors import Modules, Shape

IN_ATTENTION = {
    "q_proj": "q_proj q query wq q_lin query_proj",
    "k_proj": "k_proj k key wk k_lin key_proj",
    "v_proj": "v_proj v value wv v_lin value_proj",
    "qkv_proj": "qkv_proj query_key_value c_attn Wqkv wqkv qkv W_pack in_proj qkv_lin",
    "o_proj": "o_proj out_proj dense c_proj wo out_lin proj o attention_output output",
    "q_norm": "q_norm q_layernorm query_layernorm q_ln query_norm",
    "k_norm": "k_norm k_layernorm key_layernorm k_ln key_norm",
}
IN_LATENT_ATTENTION = {
    "q_a_proj": "q_a_proj",
    "q_a_layernorm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj_with_mqa": "kv_a_proj_with_mqa",
    "kv_a_layernorm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
}
IN_MLP = {
    "gate_proj": "gate_proj w1 gate linear_1",
    "up_proj": "up_proj c_fc fc1 fc_in dense_h_to_4h w3 wi lin1 up fc linear_v",
    "down_proj": "down_proj c_proj fc2 fc_out dense_4h_to_h w2 wo lin2 down proj output_linear",
    "gate_up_proj": "gate_up_proj gate_and_up_proj input_linear",
}
_FIRST = (
    "input_layernorm ln_1 ln1 attention_norm attn_norm norm_1 norm1 self_attn_layer_norm "
    "input_norm pre_attention_layernorm ln norm"
)
_SECOND = (
    "post_attention_layernorm ln_2 ln2 ffn_norm norm_2 norm2 final_layer_norm ffn_layernorm "
    "mlp_norm pre_mlp_layernorm pre_feedforward_layernorm"
)
_FOUR = (
    ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("post_attn_norm", "post_attention_layernorm", "post_ffn_norm"),
    ("post_norm1", "post_attention_layernorm", "post_norm2"),
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"expert")
_EMBEDDING = re.compile(
    r"embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embedding|^embeddings?$"
)
_POSITIONS = re.compile(r"wpe|embed_positions|position_embeddings?|pos_emb|positional")
_SINK = re.compile(r"sinks?$|^softmax_offset$")
_FINAL_NORM = re.compile(r"(^|\.)(norm|norm_f|ln_f|final_layernorm|final_layer_norm|final_norm)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)$")


def parts_of_layer(modules: Modules, taken: Collection[str] = ()) -> dict[str, str]:
    """Paths in a layer by their place in ours, such as "self_attn.q_proj"; known ones only.

    Args:
        modules: The tensors by place.
        taken: Paths whose place is known already.
    """
    places: dict[str, str] = {}
    for path, parameters in modules.layer.items():
        place = None if path in taken or _EXPERT.search(path) else _part(path, parameters)
        if place is not None:
            places.setdefault(place, path)
    return places


def is_sink(parameter: str) -> bool:
    """Whether a parameter of attention may be its heads' learned logits."""
    return bool(_SINK.search(parameter))


def in_mlp(leaf: str) -> str | None:
    """What a linear layer of an MLP is for, by its name."""
    return _named(leaf, IN_MLP)


def norms_of_layer(modules: Modules, taken: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The block's shape, told by its norms, and their paths by place; ("", {}) if unknown."""
    leaves = {
        path.rpartition(".")[2]: path
        for path, parameters in modules.layer.items()
        if path not in taken.values() and len(parameters.get("weight", ())) == 1
    }
    first = next((leaf for leaf in leaves if leaf in _FIRST.split()), None)
    others = [leaf for leaf in leaves if leaf != first]
    if first and not others:
        return "parallel", {"input_layernorm": leaves[first]}
    if first and len(others) == 1 and others[0] in _SECOND.split():
        return "sequential", {
            "input_layernorm": leaves[first],
            "post_attention_layernorm": leaves[others[0]],
        }
    if set(leaves) == {"ln_attn", "ln_mlp"}:
        return "parallel_norms", {
            "input_layernorm": leaves["ln_attn"],
            "post_attention_layernorm": leaves["ln_mlp"],
        }
    for names in _FOUR:
        if first and set(others) == set(names):
            places = {ours: leaves[name] for ours, name in zip(_FOUR[0], names, strict=True)}
            return "sandwich", {"input_layernorm": leaves[first], **places}
    if set(leaves) == {_FOUR[0][0], _FOUR[0][2]}:
        return "post_norm", {leaf: leaves[leaf] for leaf in leaves}
    return "", {}


def parts_around(modules: Modules) -> dict[str, str]:
    """Paths outside of the layers by their place in our model."""
    places: dict[str, str] = {}
    for path, parameters in modules.around.items():
        place = _around(path, parameters.get("weight", ()))
        if place is not None:
            places.setdefault(place, path)
    single = [path for path, has in modules.around.items() if len(has.get("weight", ())) == 1]
    if "model.norm" not in places and len(single) == 1:
        places["model.norm"] = single[0]
    return places


def _part(path: str, parameters: Mapping[str, Shape]) -> str | None:
    above, _, leaf = path.rpartition(".")
    dimensions = len(parameters.get("weight", ()))
    if _ATTENTION.search(above):
        role = _named(leaf, {**IN_ATTENTION, **IN_LATENT_ATTENTION})
        wanted = 1 if role and role.endswith("norm") else 2
        return f"self_attn.{role}" if role and dimensions == wanted else None
    role = in_mlp(leaf)
    return f"mlp.{role}" if role and dimensions == 2 else None


def _around(path: str, weight: Shape) -> str | None:
    if len(weight) == 1:
        return "model.norm" if _FINAL_NORM.search(path) else None
    if len(weight) != 2:
        return None
    words = {
        "lm_head": _HEAD,
        "model.embed_positions": _POSITIONS,
        "model.embed_tokens": _EMBEDDING,
    }
    return next((place for place, word in words.items() if word.search(path)), None)


def _named(leaf: str, words: Mapping[str, str]) -> str | None:
    return next((role for role, names in words.items() if leaf in names.split()), None)
