"""The stock decoder, described: what varies between the usual families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmfw.config import text_config
from llmfw.errors import ConfigError
from llmfw.layers.activation import Activation, GatedActivation
from llmfw.layers.latent import MLAParams
from llmfw.layers.moe import MoEParams
from llmfw.layers.rope import RopeParams

BLOCKS = ("sequential", "parallel", "parallel_norms", "sandwich", "post_norm")


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder made of stock layers.

    norm: "rms" or "layer"; norm_offset is added to an RMS norm's weight; norm_bias: layer norms
        have a bias.
    qkv_bias, o_bias, mlp_bias, lm_head_bias: which linear layers have one.
    qk_norm: q and k are normalised by the decoder's kind of norm: a head (True), or all heads
        together ("full"). sinks: a learned logit a head takes part in attention's softmax.
    gated: the MLP is act(gate) * up instead of plain. activation: its name in configurations, a
        function, or a `GatedActivation`.
    moe: a mixture of experts in place of the MLP; moe_layers: in which layers (none named: in all).
    mla: multi-head latent attention in place of attention, with rope, attn_scale and o_bias.
    rope: rotary embedding of every layer, None for none; local_rope: of the layers with a window,
        where it differs.
    learned_positions: size of a learned position table (None: none), position_offset: added to
        positions there.
    windows: sliding window by layer, None for full attention.
    attn_scale: factor of q k^T (None: head_dim ** -0.5). attn_softcap, logit_softcap: caps by tanh.
    embed_scale, residual_scale, logit_scale: factors of embeddings, of each block's output, of the
        logits.
    block: "sequential" (norm, attention, add, norm, MLP, add), "parallel" (one norm, attention and
        MLP side by side), "parallel_norms" (the same with a norm for each), "sandwich" (norms
        before and after both), "post_norm" (norms after only).
    tied: the head shares the embedding's table.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_bias: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: bool | Literal["full"] = False
    sinks: bool = False
    gated: bool = True
    activation: str | Activation | GatedActivation = "silu"
    moe: MoEParams | None = None
    moe_layers: tuple[bool, ...] = ()
    mla: MLAParams | None = None
    rope: RopeParams | None = None
    local_rope: RopeParams | None = None
    learned_positions: int | None = None
    position_offset: int = 0
    windows: tuple[int | None, ...] = ()
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float | None = None
    block: str = "sequential"
    tied: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(f"block {self.block!r} is not one of {', '.join(BLOCKS)}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.moe_layers and len(self.moe_layers) != self.num_layers:
            raise ConfigError(f"{len(self.moe_layers)} moe_layers for {self.num_layers} layers")

    def replace(self, **changes: Any) -> DecoderSpec:
        """The same decoder with some switches set differently."""
        return replace(self, **changes)

    def window(self, layer_idx: int) -> int | None:
        """The sliding window of a layer."""
        return self.windows[layer_idx] if self.windows else None

    def moe_of(self, layer_idx: int) -> MoEParams | None:
        """The mixture of experts of a layer; None where it has an MLP."""
        return self.moe if not self.moe_layers or self.moe_layers[layer_idx] else None

    def rope_of(self, layer_idx: int) -> RopeParams | None:
        """The rotary embedding of a layer."""
        if self.local_rope is not None and self.window(layer_idx) is not None:
            return self.local_rope
        return self.rope

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> DecoderSpec:
        """Derive the decoder from a transformers configuration by its usual field names.

        Args:
            config: The configuration; of a wrapper the text part is taken.
            **changes: Switches that the configuration does not tell.
        """
        config = text_config(config)
        heads = config.num_attention_heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        spec: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "num_heads": heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "intermediate_size": getattr(config, "intermediate_size", None)
            or 4 * config.hidden_size,
            "qkv_bias": attention_bias,
            "o_bias": attention_bias,
            "mlp_bias": bool(getattr(config, "mlp_bias", False)),
            "activation": _first(config, "hidden_act", "hidden_activation", "activation_function")
            or "silu",
            "windows": windows_of(config),
            "tied": bool(getattr(config, "tie_word_embeddings", False)),
            **_norm_of(config),
        }
        if "rope" not in changes and _has_rope(config):
            spec |= _ropes_of(config)
        return cls(**{**spec, **changes})


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window: by `layer_types`, else the same for all; () for none."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return ()
    types = getattr(config, "layer_types", None)
    if types:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return (window,) * int(config.num_hidden_layers)


def _norm_of(config: Any) -> dict[str, Any]:
    eps = getattr(config, "rms_norm_eps", None)
    if eps is not None:
        return {"norm": "rms", "norm_eps": eps}
    eps = _first(config, "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps")
    return {"norm": "layer", "norm_eps": eps if eps is not None else 1e-5}


def _has_rope(config: Any) -> bool:
    return any(
        getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling")
    )


def _ropes_of(config: Any) -> dict[str, RopeParams]:
    """The rotary embedding; two where `rope_parameters` has an entry for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    local = "sliding_attention"
    ropes = {"rope": RopeParams.from_config(config, "full_attention")}
    if isinstance(parameters.get(local), Mapping):
        ropes["local_rope"] = RopeParams.from_config(config, local)
    return ropes


def _first(config: Any, *names: str) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
