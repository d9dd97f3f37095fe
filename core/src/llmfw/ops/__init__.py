"""Ops: names, torch references, kernels and their resolution to plain callables."""

from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.table import Choice, OpTable

__all__ = ["Choice", "DeviceInfo", "Kernel", "OpContext", "OpTable"]
