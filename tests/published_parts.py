"""What published checkpoints are made of: sizes in small, tensors that many have, and `Layout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, ...]
H, M, V, D = 32, 48, 64, 8  # widths of hidden states, MLP, vocabulary and head
LAYERS, EXPERTS = 3, 4
SIZES: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": M,
    "vocab_size": V,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
RMS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}


def weights(**shapes: Shape) -> dict[str, Shape]:
    """Names without their ending: `a__b` is a.b."""
    return {f"{name.replace('__', '.')}.weight": shape for name, shape in shapes.items()}


def biased(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The same with a bias for each weight of a linear layer or norm."""
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
    return {**shapes, **biases}


QKVO = weights(
    self_attn__q_proj=(4 * D, H),
    self_attn__k_proj=(2 * D, H),
    self_attn__v_proj=(2 * D, H),
    self_attn__o_proj=(H, 4 * D),
)
QKV_BIAS = {
    "self_attn.q_proj.bias": (4 * D,),
    "self_attn.k_proj.bias": (2 * D,),
    "self_attn.v_proj.bias": (2 * D,),
}
QK_NORM = weights(self_attn__q_norm=(D,), self_attn__k_norm=(D,))
GATED = weights(mlp__gate_proj=(M, H), mlp__up_proj=(M, H), mlp__down_proj=(H, M))
NORMS = weights(input_layernorm=(H,), post_attention_layernorm=(H,))
FOUR_NORMS = {
    **NORMS,
    **weights(pre_feedforward_layernorm=(H,), post_feedforward_layernorm=(H,)),
}
TOP = weights(model__embed_tokens=(V, H), model__norm=(H,))
HEAD = weights(lm_head=(V, H))
EXPERT_NAMES = {"gate_proj": (M, H), "up_proj": (M, H), "down_proj": (H, M)}
NUMBERED = {
    f"mlp.experts.{expert}.{name}.weight": shape
    for expert in range(EXPERTS)
    for name, shape in EXPERT_NAMES.items()
}


@dataclass(frozen=True)
class Layout:
    """One published checkpoint.

    Args:
        config: Its config.json, less what all have.
        top: Tensors outside of the layers.
        layer: Tensors of one layer, without the prefix.
        prefix: What stands before a layer's tensors; `{i}` is its number.
        dtype: Of the tensors.
        ignored: Names (of all tensors) that no parameter takes, on purpose.
        others: Tensors of layers that have others than `layer`, and of layers beyond the last.
        dtypes: Of tensors whose names end so, where it is another.
    """

    config: Mapping[str, Any]
    top: Mapping[str, Shape]
    layer: Mapping[str, Shape]
    prefix: str = "model.layers.{i}."
    dtype: torch.dtype = torch.bfloat16
    ignored: tuple[str, ...] = field(default=())
    others: Mapping[int, Mapping[str, Shape]] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def shapes(self) -> dict[str, Shape]:
        """All names and shapes."""
        found = dict(self.top)
        for index in sorted({*range(LAYERS), *self.others}):
            start, layer = self.prefix.format(i=index), self.others.get(index, self.layer)
            found |= {start + name: shape for name, shape in layer.items()}
        return found

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return next((self.dtypes[end] for end in self.dtypes if name.endswith(end)), self.dtype)
