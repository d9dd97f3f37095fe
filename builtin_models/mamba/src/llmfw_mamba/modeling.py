"""Mamba (arXiv:2312.00752), Falcon Mamba (arXiv:2410.05355) and Mamba-2 (arXiv:2405.21060).

Layers of a norm and a mixer; a mixer keeps the last inputs of its convolution and the state h of
its state space. What decays, step sizes and gates are made of is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmfw import (
    AttentionMetadata,
    CausalConv1d,
    ConfigError,
    DecoderLayer,
    DecoderModel,
    DecoderModelForCausalLM,
    GatedRMSNorm,
    Layer,
    ModelConfig,
    RMSNorm,
    StateSpec,
    StateTensor,
)


class Mixer(Layer):
    """What both have: projections in and out, a convolution, a, d and dt_bias, and their state.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
        widths: Of the projection in, of the convolution and of the projection out.
        a_shape: Of A_log; D and dt_bias have its first dimension.
        state_shape: Of h.

    Raises:
        ConfigError: If the model is to be split over several ranks.
    """

    def __init__(
        self,
        model_config: ModelConfig[Any],
        layer_idx: int,
        *,
        widths: tuple[int, int, int],
        a_shape: tuple[int, ...],
        state_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        if model_config.mapping.tp_size > 1:
            raise ConfigError(
                "state-space layers are not split over ranks", hint="run this model on one rank"
            )
        config = model_config.pretrained_config
        self.layer_idx, self.dtype, self.state_shape = layer_idx, model_config.dtype, state_shape
        wide, conv_width, inner = widths
        self.in_proj = self.linear(model_config, "in_proj", config.hidden_size, wide)
        self.out_proj = self.linear(model_config, "out_proj", inner, config.hidden_size)
        self.conv1d = CausalConv1d(
            conv_width, config.conv_kernel, bias=config.use_conv_bias, act=config.hidden_act
        )
        self.A_log, self.D, self.dt_bias = map(_float32, (a_shape, a_shape[:1], a_shape[:1]))

    def linear(
        self, config: ModelConfig[Any], name: str, in_features: int, out_features: int
    ) -> nn.Module:
        """A linear layer; in and out have a bias where the configuration says so."""
        outer = name in ("in_proj", "out_proj")
        return config.make(
            "linear",
            name,
            layer_idx=self.layer_idx,
            in_features=in_features,
            out_features=out_features,
            bias=outer and config.pretrained_config.use_bias,
        )

    def state_spec(self) -> StateSpec:
        """The convolution's last inputs and h."""
        hidden = StateTensor(self.state_shape, torch.float32)
        tensors = {**self.conv1d.state_tensors(self.dtype), "hidden": hidden}
        return StateSpec(tensors, on_device=True)

    def post_load(self) -> None:
        """The decay rates, from the logarithms that are stored."""
        self._a = -torch.exp(self.A_log.data)


class MambaMixer(Mixer):
    """Mamba's: a step size a channel, in- and output weights that all channels share.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
    """

    def __init__(self, model_config: ModelConfig[Any], layer_idx: int) -> None:
        config = model_config.pretrained_config
        inner, size = config.intermediate_size, config.state_size
        shape, widths = (inner, size), (2 * inner, inner, inner)
        super().__init__(model_config, layer_idx, widths=widths, a_shape=shape, state_shape=shape)
        self.parts = (int(config.time_step_rank), size, size)
        self.eps: float | None = getattr(config, "mixer_rms_eps", None)
        self.x_proj = self.linear(model_config, "x_proj", inner, sum(self.parts))
        self.dt_proj = self.linear(model_config, "dt_proj", self.parts[0], inner)

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the scan."""
        channels, size = self.state_shape
        self._scan: Callable[..., torch.Tensor] = config.ops.resolve(
            "selective_scan", config.dtype, channels=channels, state_size=size
        )
        if self.eps is not None:  # norms without weights
            self._norms = [
                config.ops.resolve("rms_norm", config.dtype, hidden_size=n) for n in self.parts
            ]

    def post_load(self) -> None:
        """The decay rates, and weights of one for the norms that have none."""
        super().post_load()
        if self.eps is not None:
            self._ones = [self.D.new_ones(n, dtype=self.dtype) for n in self.parts]

    def forward(self, x: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        state = attn_metadata.states[self.layer_idx]
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # [tokens, inner] each
        x = self.conv1d(x, state, attn_metadata)
        dt, b, c = self.x_proj(x).split(self.parts, dim=-1)
        if self.eps is not None:
            normed = zip(self._norms, (dt, b, c), self._ones, strict=True)
            dt, b, c = (norm(part, ones, self.eps) for norm, part, ones in normed)
        y = self._scan(
            x, self.dt_proj(dt), self._a, b, c, self.D, gate, self.dt_bias, state["hidden"],
            attn_metadata,
        )  # fmt: skip
        return self.out_proj(y)  # type: ignore[no-any-return]


class Mamba2Mixer(Mixer):
    """Mamba-2's: one step size and decay a head; groups of heads share in- and output weights.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
    """

    def __init__(self, model_config: ModelConfig[Any], layer_idx: int) -> None:
        config = model_config.pretrained_config
        shape = (config.num_heads, config.head_dim, config.state_size)
        inner, shared = config.num_heads * config.head_dim, config.n_groups * config.state_size
        conv_width = inner + 2 * shared
        super().__init__(
            model_config,
            layer_idx,
            widths=(inner + conv_width + config.num_heads, conv_width, inner),
            a_shape=(config.num_heads,),
            state_shape=shape,
        )
        self.groups = config.n_groups
        self.in_parts = (inner, conv_width, config.num_heads)
        self.conv_parts = (inner, shared, shared)
        self.dt_limit = tuple(config.time_step_limit)
        self.norm = GatedRMSNorm(inner, config.layer_norm_epsilon, groups=config.n_groups)

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the scan."""
        heads, head_dim, size = self.state_shape
        self._scan: Callable[..., torch.Tensor] = config.ops.resolve(
            "ssd_scan", config.dtype, num_heads=heads, head_dim=head_dim,
            num_groups=self.groups, state_size=size,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        state = attn_metadata.states[self.layer_idx]
        gate, x, dt = self.in_proj(x).split(self.in_parts, dim=-1)
        x, b, c = self.conv1d(x, state, attn_metadata).split(self.conv_parts, dim=-1)
        x = x.unflatten(-1, self.state_shape[:2])  # [tokens, heads, head_dim]
        b, c = (part.unflatten(-1, (self.groups, -1)) for part in (b, c))
        y = self._scan(
            x, dt, self._a, b, c, self.D, self.dt_bias, self.dt_limit, state["hidden"],
            attn_metadata,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(1), gate))  # type: ignore[no-any-return]


class MambaLayer(DecoderLayer):
    """A norm and a mixer, beside a stream that is kept in float32 where the config says so.

    Args:
        model_config: The model's configuration.
        layer_idx: Which layer it is, from 0.
    """

    def __init__(self, model_config: ModelConfig[Any], layer_idx: int) -> None:
        super().__init__()
        config = model_config.pretrained_config
        self.stream_dtype = torch.float32 if config.residual_in_fp32 else model_config.dtype
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        mixer = Mamba2Mixer if config.model_type == "mamba2" else MambaMixer
        self.mixer = mixer(model_config, layer_idx)

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer over packed tokens: [tokens, hidden_size] -> (hidden states, residual)."""
        if residual is None:
            residual = hidden_states.to(self.stream_dtype)
            hidden = self.norm(hidden_states)
        else:
            hidden, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden, attn_metadata), residual


class MambaModel(DecoderModel[Any]):
    """Embedding, layers and norm.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        super().__init__(model_config)
        config = model_config.pretrained_config
        self.embed_tokens = model_config.make(
            "embedding",
            "embed_tokens",
            num_embeddings=config.vocab_size,
            embedding_dim=config.hidden_size,
        )
        self.layers = nn.ModuleList(
            MambaLayer(model_config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class MambaForCausalLM(DecoderModelForCausalLM[MambaModel, Any]):
    """The decoder and its head.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[Any]) -> None:
        config = model_config.pretrained_config
        super().__init__(
            MambaModel(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


def _float32(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
