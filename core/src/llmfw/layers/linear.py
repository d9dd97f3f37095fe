"""Linear layers: plain, fused from declared shards, column and row parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.config.mapping import Mapping
from llmfw.errors import ConfigError
from llmfw.layers.layer import Layer
from llmfw.weights.shards import Shard

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

PARALLEL_MODES = (None, "column", "row")


class Linear(Layer):
    """y = x W^T + b, with W [out_features, in_features].

    Args:
        in_features: Width of x, over all ranks.
        out_features: Width of y, over all ranks.
        bias: Whether there is a bias.
        shards: Names and output widths of the checkpoint's layers that this one fuses, e.g.
            `(("q_proj", 2048), ("k_proj", 512), ("v_proj", 512))`; they are siblings of this
            module there.
        parallel: "column" splits the outputs (each shard's) over the ranks, "row" the inputs.
        mapping: Parallel ranks; taken from the model's configuration when left out.
        dtype: Type of the parameters; the model's when left out. In a model of another type a
            float32 layer takes x in the model's type, and gives float32.
        reduce_output: For "row": whether to sum the ranks' results.

    Raises:
        ConfigError: If the shards do not add up, or a split does not come out even.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        shards: Sequence[tuple[str, int]] | None = None,
        parallel: str | None = None,
        mapping: Mapping | None = None,
        dtype: torch.dtype | None = None,
        reduce_output: bool = True,
    ) -> None:
        super().__init__()
        if parallel not in PARALLEL_MODES:
            raise ConfigError(f"parallel={parallel!r} is not one of {PARALLEL_MODES}")
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.parallel = parallel
        self.reduce_output = reduce_output
        self.mapping = mapping or Mapping()
        self.weight_shards = tuple(Shard(name, rows) for name, rows in shards or ())
        if self.weight_shards and sum(shard.dim0 for shard in self.weight_shards) != out_features:
            raise ConfigError(f"shards {shards} do not add up to out_features {out_features}")
        self.dtype = dtype
        self.prepared = False
        self.local_in = self._split(in_features) if parallel == "row" else in_features
        self.local_out = self._split(out_features) if parallel == "column" else out_features
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(self.local_out, self.local_in, dtype=dtype, device="meta"),
            requires_grad=False,
        )
        empty = torch.empty(self.local_out, dtype=dtype, device="meta")
        self.bias: torch.Tensor | None
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)
        self._apply_weights: Callable[..., torch.Tensor] = _unbound
        self._kernel: Any = None

    def _split(self, width: int) -> int:
        local, rest = divmod(width, self.mapping.tp_size)
        if rest:
            raise ConfigError(f"width {width} cannot be split over {self.mapping.tp_size} ranks")
        return local

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Create the weights by the quantisation method of this module, and resolve its product."""
        from llmfw.quantization import method_for

        self.dtype = self.dtype or config.dtype
        self.method = method_for(config.quant_config, self.weight_names(name))
        self.method.create_weights(self, self.dtype)
        self._kernel = self.method.resolve(self, config)
        self._apply_weights = self._kernel

    def weight_names(self, name: str) -> list[str]:
        """The checkpoint's layers that make this one, whose place in the tree is `name`."""
        parent = name.rpartition(".")[0]
        return [f"{parent}.{shard.name}" for shard in self.weight_shards] or [name]

    def post_load(self) -> None:
        """Let the kernel bring the weight into the layout that it reads."""
        self.method.post_load(self, self._kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in_features of this rank] -> [tokens, out_features of this rank]."""
        if self.parallel == "row" and self.mapping.tp_size > 1:
            return self._forward_row_parallel(x)
        return self._apply_weights(x, self.weight, self.bias)

    def _forward_row_parallel(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.mapping.tp_rank == 0 else None
        out = self._apply_weights(x, self.weight, bias)
        if self.reduce_output:
            torch.distributed.all_reduce(out)
        return out

    def extra_repr(self) -> str:
        """Shape and split, for print(model)."""
        fused = (
            f", shards={[shard.name for shard in self.weight_shards]}" if self.weight_shards else ""
        )
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, bias={self.has_bias}, parallel={self.parallel}{fused}"


class ColumnLinear(Linear):
    """A linear layer whose outputs are split over the ranks."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, parallel="column", **kwargs)


class RowLinear(Linear):
    """A linear layer whose inputs are split over the ranks, and whose results are summed."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, parallel="row", **kwargs)


def is_plain(linear: nn.Module, name: str, config: ModelConfig[Any]) -> bool:
    """Whether it is core's own layer over an unquantised weight of the model's dtype.

    Then another op may do its product. `name` is its place in the tree.
    """
    from llmfw.quantization import method_for
    from llmfw.quantization.unquantized import UnquantizedLinearMethod

    if type(linear) is not Linear or linear.dtype not in (None, config.dtype):
        return False
    method = method_for(config.quant_config, linear.weight_names(name))
    return isinstance(method, UnquantizedLinearMethod)


def _unbound(*_: Any) -> torch.Tensor:
    raise ConfigError(
        "a Linear was called before the model was built",
        hint="use llmfw.models.build, or llmfw.models.bind_tree for a lone module",
    )
