"""The seam between a linear layer and the way its weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmfw.config.quant_config import QuantConfig
from llmfw.errors import ConfigError

if TYPE_CHECKING:
    from llmfw.config import ModelConfig
    from llmfw.layers.linear import Linear


class LinearMethod(Protocol):
    """How one linear layer's weights are created, prepared and applied."""

    def create_weights(self, module: Linear, dtype: torch.dtype) -> None:
        """Put the parameters of this scheme on the module, on the meta device."""

    def resolve(self, module: Linear, config: ModelConfig[Any]) -> Callable[..., torch.Tensor]:
        """The product as a plain callable (x, weight, bias) -> y."""

    def post_load(self, module: Linear, kernel: Callable[..., torch.Tensor]) -> None:
        """Bring loaded weights into the layout of the kernel."""


def method_for(quant_config: QuantConfig, names: Sequence[str]) -> LinearMethod:
    """The method for a module called `names` in the checkpoint (several when it fuses them).

    Raises:
        ConfigError: If the scheme is not known.
    """
    from llmfw.quantization.unquantized import UnquantizedLinearMethod

    excluded = all(
        any(fnmatchcase(name, pattern) for pattern in quant_config.exclude_modules)
        for name in names
    )
    if quant_config.quant_algo is None or excluded:
        return UnquantizedLinearMethod()
    raise ConfigError(
        f"quantisation scheme {quant_config.quant_algo!r} is not supported",
        hint="load a checkpoint without quantization_config, or convert it to bfloat16 first",
    )
