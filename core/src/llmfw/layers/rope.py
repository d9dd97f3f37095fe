"""Rotary position embedding: frequencies of every scaling kind, and the table of angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmfw.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeParams:
    """Parameters of rotary embedding (arXiv:2104.09864) and its scaling.

    dim: rotated features of a head (rotary_dim). theta: base. rope_type: one of ROPE_TYPES.
    max_positions: the configuration's max_position_embeddings.
    original_max_positions: length the model was trained at before scaling.
    interleaved: pairs are (2i, 2i + 1) as in GPT-J instead of (i, i + dim / 2) as in GPT-NeoX.
    """

    dim: int
    theta: float = 10000.0
    rope_type: str = "default"
    max_positions: int = 2048
    original_max_positions: int | None = None
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type {self.rope_type!r} is not known", hint=f"known: {', '.join(ROPE_TYPES)}"
            )
        if self.dim <= 0 or self.dim % 2:
            raise ConfigError(f"rotary dimension {self.dim} is not a positive even number")
        if self.rope_type in ("linear", "dynamic", "llama3") and self.factor is None:
            raise ConfigError(f"rope_type {self.rope_type!r} needs a factor")
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ConfigError("rope_type 'longrope' needs short_factor and long_factor")

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, interleaved: bool = False
    ) -> RopeParams:
        """Read a transformers configuration: `rope_parameters`, or `rope_scaling` and `rope_theta`.

        Args:
            config: The configuration object.
            layer_type: Key into a `rope_parameters` that has one entry a layer type.
            interleaved: The pair layout, which configurations do not tell.
        """
        raw = _raw_parameters(config, layer_type)
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        partial = (
            raw.get("partial_rotary_factor")
            or getattr(config, "partial_rotary_factor", None)
            or 1.0
        )
        max_positions = int(getattr(config, "max_position_embeddings", None) or 2048)
        original = raw.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return cls(
            dim=int(head_dim * partial),
            theta=float(raw.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
            rope_type=raw.get("rope_type") or raw.get("type") or "default",
            max_positions=max_positions,
            original_max_positions=int(original) if original else None,
            factor=raw.get("factor"),
            low_freq_factor=raw.get("low_freq_factor") or 1.0,
            high_freq_factor=raw.get("high_freq_factor") or 4.0,
            beta_fast=raw.get("beta_fast") or 32.0,
            beta_slow=raw.get("beta_slow") or 1.0,
            attention_factor=raw.get("attention_factor"),
            mscale=raw.get("mscale"),
            mscale_all_dim=raw.get("mscale_all_dim"),
            truncate=raw.get("truncate", True),
            short_factor=_floats(raw.get("short_factor")),
            long_factor=_floats(raw.get("long_factor")),
            interleaved=interleaved,
        )

    @property
    def scale_factor(self) -> float:
        """The factor; the ratio of the two lengths where the configuration leaves it out."""
        if self.factor is not None:
            return float(self.factor)
        return self.max_positions / (self.original_max_positions or self.max_positions)

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by: 1 except for yarn and longrope."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.rope_type == "longrope":
            if self.scale_factor <= 1.0:
                return 1.0
            original = self.original_max_positions or self.max_positions
            return math.sqrt(1 + math.log(self.scale_factor) / math.log(original))
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.scale_factor, self.mscale) / yarn_mscale(
                self.scale_factor, self.mscale_all_dim
            )
        return yarn_mscale(self.scale_factor, 1.0)

    @property
    def score_scale(self) -> float:
        """What multi-head latent attention multiplies its scores by: mscale_all_dim's, squared."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.scale_factor, self.mscale_all_dim) ** 2

    def inv_freq(self, max_len: int | None = None) -> torch.Tensor:
        """The inverse frequencies, float32 [dim / 2].

        Args:
            max_len: Longest sequence that will run. It fixes the factors of "dynamic" and
                "longrope" once: a token's rotation never depends on the rest of the batch.
        """
        length = max_len or self.max_positions
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        plain = 1.0 / (self.theta**exponents)
        if self.rope_type == "linear":
            return plain / self.scale_factor
        if self.rope_type == "dynamic":
            length = max(length, self.max_positions)
            grown = self.scale_factor * length / self.max_positions - (self.scale_factor - 1)
            base = self.theta * float(grown ** (self.dim / (self.dim - 2)))
            return 1.0 / (base**exponents)
        if self.rope_type == "llama3":
            return self._llama3(plain)
        if self.rope_type == "yarn":
            return self._yarn(exponents)
        if self.rope_type == "longrope":
            long = length > (self.original_max_positions or self.max_positions)
            chosen = self.long_factor if long else self.short_factor
            return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * self.theta**exponents)
        return plain

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """Long wavelengths are divided by the factor, short ones kept, those between blended."""
        original = self.original_max_positions or self.max_positions
        wavelen = 2 * math.pi / plain
        low, high = self.low_freq_factor, self.high_freq_factor
        blend = ((original / wavelen - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - blend) * plain / self.scale_factor + blend * plain

    def _yarn(self, exponents: torch.Tensor) -> torch.Tensor:
        """Interpolated and extrapolated frequencies mixed by a ramp (arXiv:2309.00071)."""
        original = self.original_max_positions or self.max_positions

        def dimension_of(rotations: float) -> float:
            return (self.dim * math.log(original / (rotations * 2 * math.pi))) / (
                2 * math.log(self.theta)
            )

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        frequencies = self.theta**exponents
        extrapolated, interpolated = 1.0 / frequencies, 1.0 / (self.scale_factor * frequencies)
        return interpolated * ramp + extrapolated * (1 - ramp)

    def cos_sin(self, max_len: int) -> torch.Tensor:
        """Cosines then sines of all positions below max_len: float32 [max_len, dim]."""
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * self.inv_freq(max_len)
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.magnitude


def yarn_mscale(scale: float, mscale: float) -> float:
    """YaRN's attention temperature for a context grown by `scale` (arXiv:2309.00071)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _raw_parameters(config: Any, layer_type: str | None) -> Mapping[str, Any]:
    raw = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type is not None and isinstance(raw.get(layer_type), Mapping):
        return dict(raw[layer_type])
    return dict(raw)


def _floats(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if values else None
