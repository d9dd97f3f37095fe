"""Models: decoders made of layers, and how they are described, registered, built and loaded."""

from llmfw.models.auto import register_auto_model
from llmfw.models.build import bind_tree, build, finish_loading
from llmfw.models.causal_lm import DecoderModelForCausalLM, StockDecoderForCausalLM
from llmfw.models.decoder import (
    DecoderLayer,
    DecoderLayerList,
    DecoderModel,
    StockDecoderLayer,
    StockDecoderModel,
)
from llmfw.models.load import LoadedModel, load_model
from llmfw.models.prepare import PreparedModel, prepare_model
from llmfw.models.pretrained import PretrainedModel
from llmfw.models.spec import DecoderSpec

__all__ = [
    "DecoderLayer",
    "DecoderLayerList",
    "DecoderModel",
    "DecoderModelForCausalLM",
    "DecoderSpec",
    "LoadedModel",
    "PreparedModel",
    "PretrainedModel",
    "StockDecoderForCausalLM",
    "StockDecoderLayer",
    "StockDecoderModel",
    "bind_tree",
    "build",
    "finish_loading",
    "load_model",
    "prepare_model",
    "register_auto_model",
]
