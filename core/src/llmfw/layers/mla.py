"""Multi-head latent attention: a token's keys and values are cached as one compressed vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.attention.backend import get_attention_backend
from llmfw.attention.metadata import AttentionMetadata, CacheSpec
from llmfw.errors import ConfigError
from llmfw.layers.latent import LatentProjection, MLAParams
from llmfw.layers.layer import Layer
from llmfw.layers.norm import RMSNorm
from llmfw.layers.rope import RopeParams
from llmfw.layers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class MLA(Layer):
    """Multi-head latent attention (arXiv:2405.04434), absorbed: multi-query over the latent cache.

    A token's keys and values of all heads come from one latent of kv_lora_rank features; that and a
    key of qk_rope_head_dim features, rotated and shared by the heads, is all that is cached.
    Queries are brought into the latent's space, so that prompts, chunks, shared prefixes and single
    tokens are all the same computation; where a kernel of `expanded_attention` says that it pays,
    keys and values of a prompt are made of the latents instead.

    The submodules are `q_proj`, or with q_lora_rank `q_a_proj`, `q_a_layernorm` and `q_b_proj`;
    `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj` and `o_proj`.

    Args:
        hidden_size: Width of the hidden states.
        num_attention_heads: Query heads.
        mla: The sizes.
        config: The model's configuration.
        layer_idx: Index of the decoder layer; names the layer's cache.
        rope: Rotary embedding of qk_rope_head_dim features; None for none.
        scale: Factor of q k^T; qk_head_dim ** -0.5 times rope's `score_scale` when left out.
        bias: Whether q_a_proj, kv_a_proj_with_mqa and o_proj have biases.
        norm_eps: Of both norms.

    Raises:
        ConfigError: If the heads do not divide, or rope has another width.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        mla: MLAParams,
        config: ModelConfig[Any],
        layer_idx: int | None,
        rope: RopeParams | None = None,
        scale: float | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if layer_idx is None:
            raise ConfigError("MLA needs layer_idx: it names the layer's part of the cache")
        if rope is not None and rope.dim != mla.qk_rope_head_dim:
            raise ConfigError(
                f"rope rotates {rope.dim} features, qk_rope_head_dim is {mla.qk_rope_head_dim}"
            )
        self.layer_idx = layer_idx
        self.mla = mla
        self.dtype = config.dtype
        if scale is None:
            scale = mla.qk_head_dim**-0.5 * (rope.score_scale if rope else 1.0)
        self.scale = scale

        def linear(name: str, width: int, out: int, **more: Any) -> nn.Module:
            sizes = {"in_features": width, "out_features": out}
            return config.make("linear", name, layer_idx=layer_idx, **sizes, **more)

        def norm(name: str, width: int) -> nn.Module:
            return config.make("norm", name, layer_idx=layer_idx, hidden_size=width, eps=norm_eps)

        q_width = num_attention_heads * mla.qk_head_dim
        if mla.q_lora_rank is None:
            self.q_proj = linear("q_proj", hidden_size, q_width, bias=False, parallel="column")
        else:
            self.q_a_proj = linear("q_a_proj", hidden_size, mla.q_lora_rank, bias=bias)
            self.q_a_layernorm = norm("q_a_layernorm", mla.q_lora_rank)
            self.q_b_proj = linear(
                "q_b_proj", mla.q_lora_rank, q_width, bias=False, parallel="column"
            )
        self.kv_a_proj_with_mqa = linear(
            "kv_a_proj_with_mqa", hidden_size, mla.latent_width, bias=bias
        )
        self.kv_a_layernorm = norm("kv_a_layernorm", mla.kv_lora_rank)
        self.kv_b_proj = LatentProjection(num_attention_heads, mla, config.mapping)
        self.num_heads = self.kv_b_proj.heads
        self.o_proj = linear(
            "o_proj", num_attention_heads * mla.v_head_dim, hidden_size, bias=bias, parallel="row"
        )
        self.rotary_emb = RotaryEmbedding(rope) if rope else None

    def cache_spec(self) -> CacheSpec:
        """What this layer keeps for each token."""
        width, v_width = self.mla.latent_width, self.mla.kv_lora_rank
        return CacheSpec(1, width, self.dtype, v_head_dim=v_width, kind="latent")

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the two attention ops for this layer's shapes."""
        rope_shape = {
            "num_heads": self.num_heads,
            "latent_dim": self.mla.kv_lora_rank,
            "rotary_dim": self.mla.qk_rope_head_dim,
            "interleaved": int(self._interleaved),
            "norm": int(self._stock_norm is not None),
            "block_size": config.block_size,
        }
        shape = {
            "num_heads": self.num_heads,
            "num_kv_heads": 1,
            "head_dim": self.mla.latent_width,
            "v_head_dim": self.mla.kv_lora_rank,
            "window": 0,
            "softcap": 0,
            "sinks": 0,
            "block_size": config.block_size,
            "latent": 1,
        }
        backend = get_attention_backend(config.attn_backend)
        self._rope_and_cache, self._paged_attention = backend.resolve(
            config, rope_shape, shape, "latent_rope_and_cache"
        )
        self._bind_expanded(config)

    def _bind_expanded(self, config: ModelConfig[Any]) -> None:
        """The other way to attend, for prompts, where a kernel says when it pays."""
        self._pays: Callable[[AttentionMetadata], bool] = lambda metadata: False
        if get_attention_backend(config.attn_backend).reference_only:
            return
        self._expanded_attention = config.ops.resolve(
            "expanded_attention",
            config.dtype,
            num_heads=self.num_heads,
            latent_dim=self.mla.kv_lora_rank,
            rotary_dim=self.mla.qk_rope_head_dim,
            key_dim=self.mla.qk_nope_head_dim,
            v_head_dim=self.mla.v_head_dim,
            block_size=config.block_size,
        )
        self._pays = getattr(self._expanded_attention, "pays", self._pays)

    @property
    def _stock_norm(self) -> RMSNorm | None:
        """The norm of latents where the op that writes the cache has it too."""
        norm = self.kv_a_layernorm
        if not isinstance(norm, RMSNorm) or norm.offset or norm.dtype not in (None, self.dtype):
            return None
        return norm

    @property
    def _interleaved(self) -> bool:
        return self.rotary_emb is not None and self.rotary_emb.rope.interleaved

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size] at position_ids [tokens] -> [tokens, hidden_size]."""
        mla, cache = self.mla, attn_metadata.caches[self.layer_idx]
        slots = attn_metadata.groups[cache.group].slots
        q = self._queries(hidden_states).unflatten(-1, (self.num_heads, mla.qk_head_dim))
        q_nope, q_rope = q.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        if self._pays(attn_metadata):
            self._cache_latents(hidden_states, q_rope, position_ids, cache.k, slots, q_rope)
            return self.o_proj(self._expanded(q, attn_metadata))  # type: ignore[no-any-return]
        query = q.new_empty(q.shape[0], self.num_heads, mla.latent_width)
        absorbed, rotated = query.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        self._cache_latents(hidden_states, q_rope, position_ids, cache.k, slots, rotated)
        self.kv_b_proj.absorb(q_nope, absorbed)
        return self.o_proj(self._absorbed(query, attn_metadata))  # type: ignore[no-any-return]

    def _expanded(self, q: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """Context requests with keys and values of their own, the others absorbed.

        q [tokens, heads, qk_head_dim], rotated -> [tokens, heads * v_head_dim].
        """
        mla, cache = self.mla, attn_metadata.caches[self.layer_idx]
        view, count = attn_metadata.groups[cache.group], attn_metadata.num_context_tokens
        contexts: torch.Tensor = self._expanded_attention(
            q[:count], cache.k, self.kv_b_proj.weight, attn_metadata, view, self.scale
        )
        if count == len(q):
            return contexts
        # Made first: kernels may read lengths before the kernel right before them is done.
        generations = attn_metadata.generations
        q_nope, q_rope = q[count:].split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        query = torch.cat((self.kv_b_proj.absorb(q_nope), q_rope), dim=-1)
        return torch.cat((contexts, self._absorbed(query, generations)))

    def _absorbed(self, query: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """query [tokens, heads, latent_width] -> [tokens, heads * v_head_dim]."""
        cache = attn_metadata.caches[self.layer_idx]
        view = attn_metadata.groups[cache.group]
        attended = self._paged_attention(query, cache.k, cache.v, attn_metadata, view, self.scale)
        return self.kv_b_proj.expand(attended.unflatten(-1, (self.num_heads, -1)))

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] -> [tokens, heads * qk_head_dim]."""
        if self.mla.q_lora_rank is None:
            return self.q_proj(hidden_states)  # type: ignore[no-any-return]
        return self.q_b_proj(  # type: ignore[no-any-return]
            self.q_a_layernorm(self.q_a_proj(hidden_states))
        )

    def _cache_latents(
        self,
        hidden_states: torch.Tensor,
        q_rope: torch.Tensor,
        position_ids: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        rotated: torch.Tensor,
    ) -> None:
        """Write the tokens' latents and keys to the cache; q_rope [tokens, heads, rope] rotated."""
        kv = self.kv_a_proj_with_mqa(hidden_states)  # [tokens, kv_lora_rank + qk_rope_head_dim]
        norm, eps, stock = None, 0.0, self._stock_norm
        if stock is not None:
            norm, eps = stock.weight, stock.eps
        else:
            latent, key = kv.split([self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=-1)
            kv = torch.cat((self.kv_a_layernorm(latent), key), dim=-1)
        self._rope_and_cache(
            q_rope,
            kv,
            position_ids,
            self.rotary_emb.cos_sin if self.rotary_emb is not None else None,
            cache,
            slots,
            self._interleaved,
            norm,
            eps,
            rotated,
        )

    def extra_repr(self) -> str:
        """Shape, for print(model)."""
        mla = self.mla
        return (
            f"heads={self.num_heads}, latent={mla.kv_lora_rank}, "
            f"qk={mla.qk_nope_head_dim} + {mla.qk_rope_head_dim}, v={mla.v_head_dim}"
        )
