"""Causal self-attention over the paged cache, with everything that families vary in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llmfw.attention.backend import get_attention_backend
from llmfw.attention.metadata import AttentionMetadata, CacheSpec
from llmfw.errors import ConfigError
from llmfw.layers.layer import Layer
from llmfw.layers.norm import RMSNorm
from llmfw.layers.positional import PositionalEmbeddingParams
from llmfw.layers.rope import RopeParams
from llmfw.layers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class Attention(Layer):
    """Multi-head, grouped-query or multi-query attention with a paged KV cache.

    The submodules are `qkv_proj` (fused from q_proj, k_proj and v_proj), `o_proj` and, with
    `qk_norm`, `q_norm` and `k_norm` over each head or over all heads together.

    Args:
        hidden_size: Width of the hidden states.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; as many as query heads when left out.
        head_dim: Features of a head; hidden_size / num_attention_heads when left out.
        max_position_embeddings: Accepted for porting; the configuration's value is used.
        bias: Whether q, k and v have biases.
        dense_bias: Whether the output projection has one; as `bias` when left out.
        pos_embd_params: Rotary embedding in the form of TensorRT-LLM's guide; or use `rope`.
        rope: Rotary embedding; None for none.
        layer_idx: Index of the decoder layer; names the layer's cache.
        config: The model's configuration.
        scale: Factor of q k^T; head_dim ** -0.5 when left out.
        q_scaling: The scale is divided by it.
        sliding_window: How many of the last keys a query sees, itself included; None for all.
        softcap: Scores become softcap * tanh(scores / softcap).
        qk_norm: Whether q and k are normalised before rotation: a head, or all heads together where
            it is "full".
        norm_kind, norm_eps, norm_offset: Of those norms; the kind is "rms" or "layer".
        sinks: Whether there is a learned extra logit a head (`sinks` [heads]).
        out_name: Name of the output projection in the checkpoint.
        dtype: Accepted for porting; the configuration's dtype is used.

    Raises:
        ConfigError: If the heads do not divide.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        config: ModelConfig[Any],
        layer_idx: int | None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int | None = None,
        bias: bool = False,
        dense_bias: bool | None = None,
        pos_embd_params: PositionalEmbeddingParams | None = None,
        rope: RopeParams | None = None,
        scale: float | None = None,
        q_scaling: float = 1.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        qk_norm: bool | Literal["full"] = False,
        norm_kind: str = "rms",
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        sinks: bool = False,
        out_name: str = "o_proj",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layer_idx is None:
            raise ConfigError("Attention needs layer_idx: it names the layer's part of the cache")
        tp = config.mapping.tp_size
        kv_heads = num_key_value_heads or num_attention_heads
        if num_attention_heads % kv_heads or num_attention_heads % tp or kv_heads % tp:
            raise ConfigError(
                f"{num_attention_heads} query heads, {kv_heads} key/value heads and {tp} ranks "
                "do not divide",
                hint="choose a number of ranks that divides both, and query heads that are a "
                "multiple of the others",
            )
        self.layer_idx = layer_idx
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_heads = num_attention_heads // tp
        self.num_kv_heads = kv_heads // tp
        self.scale = (self.head_dim**-0.5 if scale is None else scale) / q_scaling
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.dtype = config.dtype
        self.out_name = out_name
        q_size, kv_size = num_attention_heads * self.head_dim, kv_heads * self.head_dim
        self.qkv_proj = config.make(
            "linear",
            "qkv_proj",
            layer_idx=layer_idx,
            in_features=hidden_size,
            out_features=q_size + 2 * kv_size,
            bias=bias,
            shards=(("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)),
            parallel="column",
        )
        out_proj = config.make(
            "linear",
            out_name,
            layer_idx=layer_idx,
            in_features=q_size,
            out_features=hidden_size,
            bias=bias if dense_bias is None else dense_bias,
            parallel="row",
        )
        self.add_module(out_name, out_proj)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.norm_all_heads = qk_norm == "full"
        if self.norm_all_heads and tp > 1:
            raise ConfigError("norms over all heads run on one tensor-parallel rank only")
        if qk_norm:
            norm = {"eps": norm_eps, "norm_kind": norm_kind, "offset": norm_offset}
            for name, size in (("q_norm", q_size), ("k_norm", kv_size)):
                width = size if self.norm_all_heads else self.head_dim
                made = config.make("norm", name, layer_idx=layer_idx, hidden_size=width, **norm)
                setattr(self, name, made)
        rope = pos_embd_params.rope if pos_embd_params is not None else rope
        self.rotary_emb = RotaryEmbedding(rope, head_dim=self.head_dim) if rope else None
        empty = torch.empty(self.num_heads, device="meta")
        self.sinks: torch.Tensor | None
        self.register_parameter(
            "sinks", nn.Parameter(empty, requires_grad=False) if sinks else None
        )

    def cache_spec(self) -> CacheSpec:
        """What this layer keeps for each token."""
        kind = "full" if self.sliding_window is None else "sliding"
        return CacheSpec(
            self.num_kv_heads, self.head_dim, self.dtype, kind=kind, window=self.sliding_window
        )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve this layer's two attention ops."""
        plain = isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm)
        fused_norm = plain and not self.norm_all_heads
        heads = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "block_size": config.block_size,
        }
        rope = self.rotary_emb.rope if self.rotary_emb else None
        rope_shape = {
            **heads,
            "rotary_dim": rope.dim if rope else 0,
            "interleaved": int(bool(rope and rope.interleaved)),
            "qk_norm": int(fused_norm),
        }
        shape = {
            **heads,
            "v_head_dim": self.head_dim,
            "window": self.sliding_window or 0,
            "softcap": int(self.softcap is not None),
            "sinks": int(self.sinks is not None),
            "latent": 0,
        }
        backend = get_attention_backend(config.attn_backend)
        self._rope_and_cache, self._paged_attention = backend.resolve(config, rope_shape, shape)
        self._fused_norm = fused_norm

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size] at position_ids [tokens] -> [tokens, hidden_size]."""
        qkv = self.qkv_proj(hidden_states)  # [tokens, (heads + 2 kv_heads) * head_dim]
        attended = self.attend(qkv, position_ids, attn_metadata)
        return self._modules[self.out_name](attended)  # type: ignore[misc, no-any-return]

    def attend(
        self, qkv: torch.Tensor, position_ids: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Packed q, k, v [tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim].

        Normalises and rotates q and k, writes K and V to the cache, then attends over the cache.
        """
        cache = attn_metadata.caches[self.layer_idx]
        view = attn_metadata.groups[cache.group]
        q_weight = k_weight = None
        eps, offset = 0.0, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            if self._fused_norm:
                q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
                eps, offset = self.q_norm.eps, self.q_norm.offset  # type: ignore[assignment]
            else:
                qkv = self._normalized(qkv)
        cos_sin, interleaved = None, False
        if self.rotary_emb is not None:
            cos_sin, interleaved = self.rotary_emb.cos_sin, self.rotary_emb.rope.interleaved
        q = self._rope_and_cache(
            qkv,
            position_ids,
            cos_sin,
            cache.k,
            cache.v,
            view.slots,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            interleaved,
            q_weight,
            k_weight,
            eps,
            offset,
        )  # [tokens, heads, head_dim]
        return self._paged_attention(
            q,
            cache.k,
            cache.v,
            attn_metadata,
            view,
            self.scale,
            self.sliding_window,
            self.softcap,
            self.sinks,
        )

    def _normalized(self, qkv: torch.Tensor) -> torch.Tensor:
        """Apply norms that are not plain RMSNorms over a head."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        if not self.norm_all_heads:
            q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        return torch.cat((self.q_norm(q).flatten(1), self.k_norm(k).flatten(1), v), dim=-1)

    def extra_repr(self) -> str:
        """Shape and switches, for print(model)."""
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"window={self.sliding_window}, softcap={self.softcap}"
        )
