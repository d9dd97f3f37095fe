"""Our attention in transformers' modules: an attention function that reads and writes the cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import AttentionInterface

from llmfw import AttentionMetadata, ModelConfig
from llmfw.attention import CacheSpec, get_attention_backend
from llmfw.layers import Layer
from llmfw_transformers.probe import AttentionCall

PAGED = "llmfw"
"""The name under which this attention is known to transformers."""

CHILD = "llmfw_attention"
"""The submodule that is put into each module of transformers that attends."""


class Step:
    """The batch that the model is running; transformers' modules do not all pass arguments down."""

    metadata: AttentionMetadata | None = None


class PagedAttention(Layer):
    """Attention of one module over the paged cache; q and k come rotated and normalised.

    Args:
        layer_idx: Names the layer's cache.
        call: What the module asks for.
        step: Where the model puts the batch.
        config: The model's configuration.
    """

    def __init__(
        self, layer_idx: int, call: AttentionCall, step: Step, config: ModelConfig[Any]
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.call = call
        self.step = step
        self.dtype = config.dtype
        self.v_padding = call.head_dim - call.v_head_dim
        self.default_scale = call.head_dim**-0.5

    def cache_spec(self) -> CacheSpec:
        """What this layer keeps for each token; values as wide as keys."""
        call = self.call
        kind = "full" if call.window is None else "sliding"
        return CacheSpec(
            call.num_kv_heads, call.head_dim, self.dtype, kind=kind, window=call.window
        )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the two attention ops."""
        call = self.call
        heads = {
            "num_heads": call.num_heads,
            "num_kv_heads": call.num_kv_heads,
            "head_dim": call.head_dim,
            "block_size": config.block_size,
        }
        write = {**heads, "rotary_dim": 0, "interleaved": 0, "qk_norm": 0}
        attend = {
            **heads,
            "v_head_dim": call.head_dim,
            "window": call.window or 0,
            "softcap": int(call.has_softcap),
            "sinks": int(call.has_sinks),
            "latent": 0,
        }
        backend = get_attention_backend(config.attn_backend)
        self._write, self._attend = backend.resolve(config, write, attend)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write K and V to the cache and attend over it.

        Args:
            query: [1, heads, tokens, head_dim]; key and value alike, with their heads.
            key: [1, kv_heads, tokens, head_dim].
            value: [1, kv_heads, tokens, v_head_dim].
            scale: Factor of q k^T; head_dim ** -0.5 when None.
            softcap: Cap of the scores.
            sinks: An extra logit a head, [heads].

        Returns:
            [1, tokens, heads, v_head_dim].
        """
        metadata = self.step.metadata
        assert metadata is not None
        call = self.call
        cache = metadata.caches[self.layer_idx]
        view = metadata.groups[cache.group]
        if self.v_padding:
            value = F.pad(value, (0, self.v_padding))
        heads = [each[0].transpose(0, 1) for each in (query, key, value)]  # [tokens, heads, dim]
        q = self._write(
            torch.cat(heads, 1).to(self.dtype).flatten(1),
            metadata.positions,
            None,
            cache.k,
            cache.v,
            view.slots,
            call.num_heads,
            call.num_kv_heads,
            call.head_dim,
        )
        out = self._attend(
            q,
            cache.k,
            cache.v,
            metadata,
            view,
            self.default_scale if scale is None else scale,
            call.window,
            softcap,
            sinks,
        ).view(1, -1, call.num_heads, call.head_dim)
        return out[..., : call.v_head_dim] if self.v_padding else out

    def extra_repr(self) -> str:
        """Shape and switches, for print(model)."""
        return str(self.call)


def paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' modules call; there is no mask, the cache knows each request's length."""
    attention: PagedAttention = module._modules[CHILD]
    return attention.attend(query, key, value, scaling, softcap, s_aux), None


AttentionInterface.register(PAGED, paged_attention_forward)
