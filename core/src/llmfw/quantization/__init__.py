"""Quantisation: how weights of a linear layer are made, loaded and applied; a file a scheme."""

from llmfw.quantization.base import LinearMethod, method_for
from llmfw.quantization.unquantized import UnquantizedLinearMethod

__all__ = ["LinearMethod", "UnquantizedLinearMethod", "method_for"]
