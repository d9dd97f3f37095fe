"""A model whose MLP runs by the pack's own op."""

from __future__ import annotations

from llmfw import hookimpl
from llmfw.layers import Layer


class SquaredMLP(Layer):
    """down(relu(up(x)) ** 2)."""

    def __init__(self, config, layer_idx, hidden_size, intermediate_size, **spec):
        super().__init__()
        self.up_proj = config.make(
            "linear",
            "up_proj",
            layer_idx=layer_idx,
            in_features=hidden_size,
            out_features=intermediate_size,
            bias=False,
        )
        self.down_proj = config.make(
            "linear",
            "down_proj",
            layer_idx=layer_idx,
            in_features=intermediate_size,
            out_features=hidden_size,
            bias=False,
        )

    def bind(self, name, config):
        """Take whatever serves the op."""
        self._activation = config.ops.resolve("squared_relu", config.dtype)

    def forward(self, x, **kwargs):
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        return self.down_proj(self._activation(self.up_proj(x)))


class AcmeModel:
    """The stock decoder with another MLP."""

    @hookimpl
    def llmfw_layer(self, kind, role, model_config, layer_idx, spec):
        """Ours in the place of every MLP; core's for all else."""
        return SquaredMLP(model_config, layer_idx, **spec) if kind == "mlp" else None


plugin = AcmeModel()
