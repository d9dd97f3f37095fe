"""Token embedding and the language-model head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.layers.layer import Layer
from llmfw.layers.linear import Linear

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class Embedding(Layer):
    """Rows of a table [num_embeddings, embedding_dim] by token id.

    Args:
        num_embeddings: Size of the vocabulary (or number of positions).
        embedding_dim: Width of a row.
        dtype: Type of the table; the model's when left out.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, dtype=dtype, device="meta"),
            requires_grad=False,
        )
        self._gather: Callable[..., torch.Tensor] | None = None

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the table the model's dtype and resolve the gather."""
        self.dtype = self.dtype or config.dtype
        self.weight = nn.Parameter(
            torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta"),
            requires_grad=False,
        )
        self._gather = config.ops.resolve(
            "embedding",
            self.dtype,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [tokens] -> [tokens, embedding_dim]."""
        assert self._gather is not None
        return self._gather(input_ids, self.weight)

    def extra_repr(self) -> str:
        """Shape, for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LMHead(Linear):
    """The last linear layer: hidden states -> logits over the vocabulary.

    Args:
        num_embeddings: Size of the vocabulary.
        embedding_dim: Width of the hidden states.
        bias: Whether there is a bias.
        **kwargs: As `Linear`.
    """

    tied_to: Any = None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, bias: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, bias=bias, **kwargs)

    def tie_weights(self, embedding: Any) -> None:
        """Share the `weight` of an embedding, ours or another module (tie_word_embeddings)."""
        object.__setattr__(self, "tied_to", embedding)  # a plain reference, not a submodule
        self.weight = embedding.weight

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """As `Linear`; a tied head then takes the embedding's parameter."""
        super().bind(name, config)
        if self.tied_to is not None:
            self.weight = self.tied_to.weight
