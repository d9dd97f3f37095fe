"""The decoder: its layers, the stack of them, and the stock layer in its five shapes."""

from __future__ import annotations

from typing import Any, Generic

import torch
from torch import nn

from llmfw.attention.metadata import AttentionMetadata
from llmfw.config import ModelConfig, TConfig
from llmfw.layers.layer import Layer
from llmfw.models.shared_norms import SharedNorms, shared_norms
from llmfw.models.spec import DecoderSpec

LayerOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class DecoderLayer(Layer):
    """Base of a decoder layer.

    `forward(position_ids, hidden_states, attn_metadata, residual=None, **kwargs)` returns the
    hidden states [tokens, hidden_size], or `(hidden_states, residual)` whose sum is the stream;
    then the next layer gets that residual.
    """


class StockDecoderLayer(DecoderLayer):
    """The decoder layer that a `DecoderSpec` describes; its residual stays apart for fusion."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def __init__(self, config: ModelConfig[Any], layer_idx: int, spec: DecoderSpec) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size = spec.hidden_size
        self.residual_scale = spec.residual_scale
        self.block = spec.block
        make = config.make
        kind = "attention" if spec.mla is None else "mla"
        attention = attention_arguments(spec, layer_idx)
        self.self_attn = make(kind, "self_attn", layer_idx=layer_idx, **attention)
        moe = spec.moe_of(layer_idx)
        mlp = {"hidden_size": spec.hidden_size, "activation": spec.activation}
        if moe is not None:
            self.mlp = make("moe", "mlp", layer_idx=layer_idx, moe=moe, **mlp)
        else:
            self.mlp = make(
                "mlp",
                "mlp",
                layer_idx=layer_idx,
                intermediate_size=spec.intermediate_size,
                bias=spec.mlp_bias,
                gated=spec.gated,
                **mlp,
            )
        for role in _NORMS[spec.block]:
            self.add_module(role, make("norm", role, layer_idx=layer_idx, **norm_arguments(spec)))

    @property
    def divides_norms(self) -> bool:
        """Whether each norm stands between two products, as `SharedNorms` takes it."""
        own = type(self) is StockDecoderLayer
        return own and self.block == "sequential" and self.residual_scale is None

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LayerOutput:
        """One layer over packed tokens: [tokens, hidden_size] -> (hidden states, residual)."""
        step = {
            "sequential": self._sequential,
            "parallel": self._parallel,
            "parallel_norms": self._parallel,
            "sandwich": self._sandwich,
            "post_norm": self._post_norm,
        }[self.block]
        return step(position_ids, hidden_states, attn_metadata, residual, kwargs)

    def _scaled(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.residual_scale is None else branch * self.residual_scale

    def _sequential(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: AttentionMetadata,
        residual: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> LayerOutput:
        hidden, residual = _enter(self.input_layernorm, hidden, residual)
        hidden = self._scaled(self.self_attn(position_ids, hidden, metadata, **kwargs))
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self._scaled(self.mlp(hidden, **kwargs)), residual

    def _parallel(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: AttentionMetadata,
        residual: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> LayerOutput:
        hidden, residual = _enter(self.input_layernorm, hidden, residual)
        attended = self.self_attn(position_ids, hidden, metadata, **kwargs)
        if self.block == "parallel_norms":
            hidden = self.post_attention_layernorm(residual)
        return self._scaled(attended + self.mlp(hidden, **kwargs)), residual

    def _sandwich(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: AttentionMetadata,
        residual: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> LayerOutput:
        hidden, residual = _enter(self.input_layernorm, hidden, residual)
        hidden = self.post_attention_layernorm(
            self.self_attn(position_ids, hidden, metadata, **kwargs)
        )
        hidden, residual = self.pre_feedforward_layernorm(self._scaled(hidden), residual)
        return self._scaled(self.post_feedforward_layernorm(self.mlp(hidden, **kwargs))), residual

    def _post_norm(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: AttentionMetadata,
        residual: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> LayerOutput:
        stream = hidden if residual is None else hidden + residual
        attended = self.self_attn(position_ids, stream, metadata, **kwargs)
        stream = stream + self._scaled(self.post_attention_layernorm(attended))
        return self._scaled(self.post_feedforward_layernorm(self.mlp(stream, **kwargs))), stream


_NORMS = {
    "sequential": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm",),
    "parallel_norms": ("input_layernorm", "post_attention_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post_norm": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def attention_arguments(spec: DecoderSpec, layer_idx: int) -> dict[str, Any]:
    """The arguments of a layer's stock attention, or of its latent attention."""
    shared = {
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "rope": spec.rope_of(layer_idx),
        "scale": spec.attn_scale,
    }
    if spec.mla is not None:
        return {**shared, "mla": spec.mla, "bias": spec.o_bias}
    return {
        **shared,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "bias": spec.qkv_bias,
        "dense_bias": spec.o_bias,
        "sliding_window": spec.window(layer_idx),
        "softcap": spec.attn_softcap,
        "qk_norm": spec.qk_norm,
        "sinks": spec.sinks,
        "norm_kind": spec.norm,
        "norm_eps": spec.norm_eps,
        "norm_offset": spec.norm_offset,
    }


def norm_arguments(spec: DecoderSpec) -> dict[str, Any]:
    """The arguments of a stock norm over the hidden states."""
    return {
        "hidden_size": spec.hidden_size,
        "eps": spec.norm_eps,
        "norm_kind": spec.norm,
        "offset": spec.norm_offset,
        "bias": spec.norm_bias,
    }


def _enter(
    norm: Any, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the stream; returns (normalised, stream)."""
    if residual is None:
        return norm(hidden), hidden
    return norm(hidden, residual)  # type: ignore[no-any-return]


class DecoderLayerList(nn.ModuleList):
    """num_hidden_layers layers of one class, as in TensorRT-LLM's older guide.

    Args:
        layer_class: Called with (config, layer_idx).
        config: The model's configuration.
    """

    def __init__(self, layer_class: type[nn.Module], config: ModelConfig[Any]) -> None:
        count = config.pretrained_config.num_hidden_layers
        super().__init__(layer_class(config, index) for index in range(count))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the layers one after the other, each with the same keyword arguments."""
        for layer in self:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class DecoderModel(Layer, Generic[TConfig]):
    """A stack of decoder layers between an embedding and a final norm.

    A subclass sets `embed_tokens`, `layers` and mostly `norm`; the default forward then
    serves.

    Args:
        model_config: The model's configuration.
    """

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module | None

    def __init__(self, model_config: ModelConfig[TConfig]) -> None:
        super().__init__()
        self.model_config = model_config

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The stream before the first layer: [tokens] -> [tokens, hidden_size]."""
        return self.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """input_ids, position_ids int64 [tokens] -> final hidden states [tokens, hidden_size]."""
        position_ids = attn_metadata.positions if position_ids is None else position_ids
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, position_ids)
        return self.run_layers(position_ids, inputs_embeds, attn_metadata, **kwargs)

    def run_layers(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """All layers and the last norm: [tokens, hidden_size] -> [tokens, hidden_size]."""
        residual: torch.Tensor | None = None
        for layer in self.layers:
            output = layer(
                position_ids=position_ids,
                hidden_states=hidden,
                attn_metadata=attn_metadata,
                residual=residual,
                **kwargs,
            )
            hidden, residual = output if isinstance(output, tuple) else (output, None)
        return self._finish(hidden, residual)

    def _finish(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        norm = getattr(self, "norm", None)
        if norm is None:
            return hidden if residual is None else hidden + residual
        if residual is None:
            return norm(hidden)  # type: ignore[no-any-return]
        return norm(hidden, residual)[0]  # type: ignore[no-any-return]


class StockDecoderModel(DecoderModel[Any]):
    """The decoder that a `DecoderSpec` describes: embed_tokens, layers, norm."""

    def __init__(self, model_config: ModelConfig[Any], spec: DecoderSpec) -> None:
        super().__init__(model_config)
        self.position_offset = spec.position_offset
        make = model_config.make
        scaled: dict[str, Any] = {} if spec.embed_scale is None else {"scale": spec.embed_scale}
        self.embed_tokens = make(
            "embedding",
            "embed_tokens",
            num_embeddings=spec.vocab_size,
            embedding_dim=spec.hidden_size,
            **scaled,
        )
        self.embed_positions: nn.Module | None = None
        if spec.learned_positions is not None:
            self.embed_positions = make(
                "embedding",
                "embed_positions",
                num_embeddings=spec.learned_positions + spec.position_offset,
                embedding_dim=spec.hidden_size,
            )
        self.layers = nn.ModuleList(
            make("decoder", "layers", layer_idx=index, spec=spec)
            for index in range(spec.num_layers)
        )
        self.norm = make("norm", "norm", **norm_arguments(spec))
        self._shared_norms: SharedNorms | None = None

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Find the kernels that norms can be parts of."""
        self._shared_norms = shared_norms(self.layers, name, config)

    def post_load(self) -> None:
        """Keep to the layers' own forward where a kernel brought a weight into another layout."""
        if self._shared_norms is not None and not self._shared_norms.weights_as_loaded:
            self._shared_norms = None

    def run_layers(
        self,
        position_ids: torch.Tensor,
        hidden: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the decoder's, and for few rows with norms inside the products beside them."""
        shared = self._shared_norms
        if shared is not None and not kwargs and shared.serves(self.layers, hidden):
            return self._finish(*shared(position_ids, hidden, attn_metadata))
        return super().run_layers(position_ids, hidden, attn_metadata, **kwargs)

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embedding, with learned positions where the decoder has them."""
        hidden = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(position_ids + self.position_offset)
        return hidden  # type: ignore[no-any-return]
