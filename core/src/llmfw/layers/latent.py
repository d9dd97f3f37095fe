"""Sizes of multi-head latent attention, and the product that makes keys and values of latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.errors import ConfigError
from llmfw.layers.layer import Layer
from llmfw.quantization import UnquantizedLinearMethod, method_for

if TYPE_CHECKING:
    from llmfw.config import Mapping, ModelConfig


@dataclass(frozen=True)
class MLAParams:
    """What multi-head latent attention varies in.

    kv_lora_rank: features of the latent from which keys and values are made.
    qk_nope_head_dim, qk_rope_head_dim: features of a query and key head that are not rotated, and
        that are; the rotated part of the key is shared by all heads.
    v_head_dim: features of a value head.
    q_lora_rank: features that queries are compressed to, None where they are not.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> MLAParams:
        """Read a transformers configuration by its usual field names."""
        return cls(
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=getattr(config, "q_lora_rank", None),
        )

    @property
    def qk_head_dim(self) -> int:
        """Features of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Features that the cache holds for a token: the latent, then the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class LatentProjection(Layer):
    """The product that makes keys and values of a latent, in the two forms that attention takes.

    Its weight [heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank] has each head's rows for the
    key, then those for the value. As q (K c) = (q K) c, the key's part is applied to the query; the
    value's part to the weighted sum of latents. So neither keys nor values are ever made.

    Args:
        heads: Of all ranks; they are split over the ranks.
        mla: The sizes.
        mapping: Parallel ranks.

    Raises:
        ConfigError: Where the heads cannot be split, or the weight is to be quantised.
    """

    parallel = "column"

    def __init__(self, heads: int, mla: MLAParams, mapping: Mapping) -> None:
        super().__init__()
        self.heads, rest = divmod(heads, mapping.tp_size)
        if rest:
            raise ConfigError(f"{heads} heads cannot be split over {mapping.tp_size} ranks")
        self.mla = mla
        self._declare(None)

    def _declare(self, dtype: torch.dtype | None) -> None:
        rows = self.heads * (self.mla.qk_nope_head_dim + self.mla.v_head_dim)
        empty = torch.empty(rows, self.mla.kv_lora_rank, dtype=dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the weight the model's dtype and resolve both products."""
        if not isinstance(method_for(config.quant_config, [name]), UnquantizedLinearMethod):
            raise ConfigError(
                f"{name} cannot be quantised: its weight is applied in parts",
                hint=f"exclude {name} from quantisation",
            )
        self._declare(config.dtype)
        self._to_latent = self._product(config, self.mla.qk_nope_head_dim, self.mla.kv_lora_rank)
        self._from_latent = self._product(config, self.mla.kv_lora_rank, self.mla.v_head_dim)

    def _product(
        self, config: ModelConfig[Any], in_features: int, out_features: int
    ) -> Callable[..., torch.Tensor]:
        sizes = {"in_features": in_features, "out_features": out_features}
        return config.ops.resolve("head_linear", config.dtype, num_heads=self.heads, **sizes)

    def post_load(self) -> None:
        """Cut the weight into its two parts, in the layouts that the kernels want."""
        if self.weight.is_meta:
            return
        by_head = self.weight.view(self.heads, -1, self.mla.kv_lora_rank)
        keys, values = by_head.split([self.mla.qk_nope_head_dim, self.mla.v_head_dim], dim=1)
        self._keys = _prepared(self._to_latent, keys.transpose(1, 2))  # [heads, rank, nope]
        self._values = _prepared(self._from_latent, values)  # [heads, v_head_dim, rank]

    def absorb(self, q: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """q [tokens, heads, qk_nope_head_dim] -> [tokens, heads, kv_lora_rank], in `out` if any."""
        return self._to_latent(q, self._keys, out)

    def expand(self, latent: torch.Tensor) -> torch.Tensor:
        """latent [tokens, heads, kv_lora_rank] -> [tokens, heads * v_head_dim]."""
        return self._from_latent(latent, self._values).flatten(1)


def _prepared(kernel: Callable[..., torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """The weight in the layout of a kernel that has one of its own."""
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = getattr(kernel, "prepare", None)
    return weight if prepare is None else prepare(weight)
