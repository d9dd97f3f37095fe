"""Token embedding and the language-model head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.config.mapping import Mapping
from llmfw.errors import ConfigError
from llmfw.layers.layer import Layer
from llmfw.layers.linear import Linear

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class Embedding(Layer):
    """Rows of a table [num_embeddings, embedding_dim] by token id.

    Args:
        num_embeddings: Size of the vocabulary (or number of positions), over all ranks.
        embedding_dim: Width of a row.
        dtype: Type of the table; the model's when left out.
        scale: Factor of the rows; in the table's dtype, as the rows are.
        parallel: "column" splits the table's rows over the ranks (vocabulary-parallel): a rank
            gives zeros for ids whose rows are another's, and the ranks' results are summed.
        mapping: Parallel ranks.
        reduce_output: For "column": whether to sum the ranks' results.

    Raises:
        ConfigError: If the rows cannot be split evenly.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        scale: float | None = None,
        parallel: str | None = None,
        mapping: Mapping | None = None,
        reduce_output: bool = True,
    ) -> None:
        super().__init__()
        if parallel not in (None, "column"):
            raise ConfigError(f"parallel={parallel!r} of an embedding is not None or 'column'")
        self.mapping = mapping or Mapping()
        ranks = self.mapping.tp_size if parallel else 1
        if num_embeddings % ranks:
            raise ConfigError(f"{num_embeddings} rows cannot be split over {ranks} ranks")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.scale = scale
        self.parallel = parallel
        self.reduce_output = reduce_output
        self.local_rows = num_embeddings // ranks
        self.first_row = self.mapping.tp_rank * self.local_rows if ranks > 1 else None
        self._declare(dtype)
        self._gather: Callable[..., torch.Tensor] | None = None

    def _declare(self, dtype: torch.dtype | None) -> None:
        shape = (self.local_rows, self.embedding_dim)
        table = torch.empty(shape, dtype=dtype, device="meta")
        self.weight: torch.Tensor = nn.Parameter(table, requires_grad=False)

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give table and scale the model's dtype and resolve the gather."""
        self.dtype = self.dtype or config.dtype
        self._declare(self.dtype)
        if self.scale is not None:
            self.scale = float(torch.tensor(self.scale, dtype=self.dtype, device="cpu"))
        self._gather = config.ops.resolve(
            "embedding",
            self.dtype,
            num_embeddings=self.local_rows,
            embedding_dim=self.embedding_dim,
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [tokens] -> [tokens, embedding_dim]."""
        assert self._gather is not None
        out = self._gather(input_ids, self.weight, self.first_row, self.scale)
        if self.first_row is not None and self.reduce_output:
            torch.distributed.all_reduce(out)
        return out

    def extra_repr(self) -> str:
        """Shape and split, for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, parallel={self.parallel}"


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
