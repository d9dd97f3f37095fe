"""Positional embedding in the vocabulary of TensorRT-LLM's guide."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmfw.errors import ConfigError
from llmfw.layers.rope import RopeParams


class PositionEmbeddingType(Enum):
    """How positions enter the model."""

    learned_absolute = "learned_absolute"
    rope_gptj = "rope_gptj"
    rope_gpt_neox = "rope_gpt_neox"
    yarn = "yarn"
    long_rope = "long_rope"

    def is_rope(self) -> bool:
        """Whether q and k are rotated."""
        return self is not PositionEmbeddingType.learned_absolute


@dataclass(frozen=True)
class PositionalEmbeddingParams:
    """Positional embedding of an attention layer: its type and rotary parameters."""

    type: PositionEmbeddingType
    rope: RopeParams | None = None

    def __post_init__(self) -> None:
        if self.type.is_rope() and self.rope is None:
            raise ConfigError(f"positional embedding {self.type.value} needs rope parameters")
