"""llmfw: plugin-first LLM inference.

    from llmfw import LLM, SamplingParams

    with LLM("path/to/model") as llm:
        answer = llm.generate("The capital of France is", SamplingParams(max_tokens=16))
        print(answer.outputs[0].text)

Every public name is imported on first use, so `import llmfw` is instant and loads neither torch nor
a plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfw.attention import AttentionMetadata, CacheSpec, StateSpec, StateTensor
    from llmfw.config import Mapping, ModelConfig, QuantConfig
    from llmfw.errors import (
        CheckpointError,
        ConfigError,
        DeviceError,
        EngineError,
        ForeignDistributionError,
        KernelError,
        LlmfwError,
        PluginConflictError,
        PluginContractError,
        PluginError,
        PluginIncompatibleError,
        PluginLoadError,
        RequestError,
        TokenizerError,
        UnknownArchitectureError,
        UsageError,
        WeightError,
    )
    from llmfw.layers import (
        MLA,
        MLP,
        Attention,
        CausalConv1d,
        ColumnLinear,
        Embedding,
        GatedActivation,
        GatedMLP,
        GatedRMSNorm,
        Layer,
        LayerNorm,
        Linear,
        LMHead,
        MLAParams,
        MoE,
        MoEParams,
        PositionalEmbeddingParams,
        PositionEmbeddingType,
        RMSNorm,
        RopeParams,
        RotaryEmbedding,
        RowLinear,
    )
    from llmfw.llm import LLM
    from llmfw.models import (
        DecoderLayer,
        DecoderLayerList,
        DecoderModel,
        DecoderModelForCausalLM,
        DecoderSpec,
        PretrainedModel,
        StockDecoderForCausalLM,
        StockDecoderLayer,
        StockDecoderModel,
        build,
        register_auto_model,
    )
    from llmfw.ops import Kernel
    from llmfw.plugins import hookimpl
    from llmfw.request import CompletionOutput, RequestOutput
    from llmfw.sampling_params import SamplingParams
    from llmfw.weights import WeightMap

    __version__: str

__all__ = [
    "__version__",
    # running a model
    "LLM",
    "SamplingParams",
    "RequestOutput",
    "CompletionOutput",
    # writing a model
    "ModelConfig",
    "Mapping",
    "QuantConfig",
    "DecoderSpec",
    "PretrainedModel",
    "StockDecoderForCausalLM",
    "StockDecoderModel",
    "StockDecoderLayer",
    "DecoderLayer",
    "DecoderLayerList",
    "DecoderModel",
    "DecoderModelForCausalLM",
    "register_auto_model",
    "build",
    "Layer",
    "Attention",
    "AttentionMetadata",
    "CacheSpec",
    "CausalConv1d",
    "StateSpec",
    "StateTensor",
    "MLA",
    "MLAParams",
    "MLP",
    "GatedMLP",
    "GatedRMSNorm",
    "GatedActivation",
    "MoE",
    "MoEParams",
    "Linear",
    "ColumnLinear",
    "RowLinear",
    "Embedding",
    "LMHead",
    "RotaryEmbedding",
    "RopeParams",
    "PositionalEmbeddingParams",
    "PositionEmbeddingType",
    "RMSNorm",
    "LayerNorm",
    "WeightMap",
    # writing a plugin
    "hookimpl",
    "Kernel",
    # what can go wrong
    "LlmfwError",
    "UsageError",
    "ConfigError",
    "CheckpointError",
    "WeightError",
    "PluginError",
    "UnknownArchitectureError",
    "PluginConflictError",
    "PluginLoadError",
    "PluginIncompatibleError",
    "PluginContractError",
    "ForeignDistributionError",
    "KernelError",
    "DeviceError",
    "RequestError",
    "TokenizerError",
    "EngineError",
]

_NAMES = {
    "llmfw.attention": ("AttentionMetadata", "CacheSpec", "StateSpec", "StateTensor"),
    "llmfw.config": ("Mapping", "ModelConfig", "QuantConfig"),
    "llmfw.layers": (
        "Attention",
        "CausalConv1d",
        "ColumnLinear",
        "Embedding",
        "GatedActivation",
        "GatedMLP",
        "GatedRMSNorm",
        "LMHead",
        "Layer",
        "LayerNorm",
        "Linear",
        "MLA",
        "MLAParams",
        "MLP",
        "MoE",
        "MoEParams",
        "PositionEmbeddingType",
        "PositionalEmbeddingParams",
        "RMSNorm",
        "RopeParams",
        "RotaryEmbedding",
        "RowLinear",
    ),
    "llmfw.llm": ("LLM",),
    "llmfw.models": (
        "DecoderLayer",
        "DecoderLayerList",
        "DecoderModel",
        "DecoderModelForCausalLM",
        "DecoderSpec",
        "PretrainedModel",
        "StockDecoderForCausalLM",
        "StockDecoderLayer",
        "StockDecoderModel",
        "build",
        "register_auto_model",
    ),
    "llmfw.ops": ("Kernel",),
    "llmfw.plugins": ("hookimpl",),
    "llmfw.request": ("CompletionOutput", "RequestOutput"),
    "llmfw.sampling_params": ("SamplingParams",),
    "llmfw.weights": ("WeightMap",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES |= {name: "llmfw.errors" for name in __all__ if name.endswith("Error")}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("llmfw-core")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'llmfw' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
