"""The rotary embedding as a layer: it holds the shared table of cosines and sines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmfw.layers.layer import Layer
from llmfw.layers.rope import RopeParams
from llmfw.ops.reference import apply_rope

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class RotaryEmbedding(Layer):
    """Rotary position embedding (arXiv:2104.09864).

    Args:
        rope: Its parameters.
        head_dim: Features of a head; only the first `rope.dim` are rotated.
    """

    def __init__(self, rope: RopeParams, *, head_dim: int | None = None) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim or rope.dim
        self.cos_sin: torch.Tensor | None = None

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Remember how long the table must be and where it lives."""
        self._length = config.max_model_len or self.rope.max_positions
        self._device = config.device
        self._tables = config.tables

    def post_load(self) -> None:
        """Compute the table, or take it from a layer with the same parameters."""
        key = ("rope", self.rope, self._length, self._device)
        if key not in self._tables:
            with torch.device("cpu"):
                self._tables[key] = self.rope.cos_sin(self._length).to(self._device)
        self.cos_sin = self._tables[key]

    def forward(
        self, position_ids: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] at [tokens]."""
        assert self.cos_sin is not None
        cos, sin = self.cos_sin[position_ids].chunk(2, dim=-1)
        return apply_rope(q, cos, sin, self.rope.interleaved), apply_rope(
            k, cos, sin, self.rope.interleaved
        )

    def extra_repr(self) -> str:
        """Parameters, for print(model)."""
        return f"{self.rope.rope_type}, dim={self.rope.dim}, theta={self.rope.theta}"
