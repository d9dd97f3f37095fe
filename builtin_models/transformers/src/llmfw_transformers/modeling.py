"""transformers' module tree on packed inputs and a paged cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers

from llmfw import AttentionMetadata, ModelConfig
from llmfw.errors import ConfigError
from llmfw.models import PretrainedModel
from llmfw_transformers.architectures import NAME, declared_model, refused
from llmfw_transformers.attention import CHILD, PAGED, PagedAttention, Step
from llmfw_transformers.buffers import Table, computed_buffers, freeze_rope
from llmfw_transformers.probe import PROBE, Findings, Unservable, probe
from llmfw_transformers.replace import (
    keep_in_float32,
    replace_layers,
    replaces_layers,
    tie_parameters,
)

logger = logging.getLogger("llmfw.fallback")


class TransformersForCausalLM(PretrainedModel[Any]):
    """A causal model of transformers: its modules and forward, our cache, layers and engine.

    Args:
        config: The model's configuration; the pretrained one is transformers' own.

    Raises:
        UnknownArchitectureError: If the model cannot be served, and why.
        ConfigError: If ranks are asked for.
    """

    def __init__(self, config: ModelConfig[Any]) -> None:
        super().__init__(config)
        if config.mapping.tp_size > 1:
            raise ConfigError(
                f"the fallback {NAME} runs on one rank", hint="a plugin of its own runs on several"
            )
        architecture = str(config.pretrained_config.architectures[0])
        self.step = Step()
        try:
            model, tables, findings = _declare(config)
        except Unservable as exc:
            cure = "a plugin of its own may: llmfw new --from MODEL"
            raise refused(architecture, str(exc), cure) from exc
        replaced: Mapping[str, int] = {}
        if replaces_layers():
            replaced = replace_layers(model, findings.inputs, config)
        else:
            tie_parameters(model)
        for index, (path, call) in enumerate(findings.calls.items()):
            attention = PagedAttention(index, call, self.step, config)
            model.get_submodule(path).add_module(CHILD, attention)
        for module, name, table in tables:
            module._buffers[name] = table
        self._adopt(model)
        _tell(architecture, len(findings.calls), tuple(replaced.items()))

    def _adopt(self, model: Any) -> None:
        """Take over the tree, its paths unchanged; `forward` runs transformers' own."""
        self._modules = model._modules
        self._parameters = model._parameters
        self._buffers = model._buffers
        object.__setattr__(self, "hf", model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    hf: Any

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_context_logits: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Logits of the packed batch; arguments as `DecoderModelForCausalLM` takes them."""
        positions = attn_metadata.positions if position_ids is None else position_ids
        rows = None if return_context_logits else attn_metadata.logits_indices
        options = {"logits_to_keep": rows} if self._keeps and rows is not None else {}
        tokens = (
            {"input_ids": input_ids[None]}
            if input_ids is not None
            else {"inputs_embeds": None if inputs_embeds is None else inputs_embeds[None]}
        )
        self.step.metadata = attn_metadata
        try:
            out = self.hf(position_ids=positions[None], use_cache=False, **tokens, **options)
        finally:
            self.step.metadata = None
        logits: torch.Tensor = out.logits[0]  # [rows, vocab_size]
        return logits if rows is None or options else logits[rows]


def _declare(config: ModelConfig[Any]) -> tuple[Any, list[Table], Findings]:
    """transformers' model on the meta device, its computed buffers, what its dry run found.

    Raises:
        Unservable: If it cannot be served.
    """
    try:
        model = declared_model(config.pretrained_config, PROBE)
    except (KeyError, ValueError) as exc:
        raise Unservable(
            f"its attention does not go through transformers' attention interface: {exc!r}"
        ) from exc
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise Unservable("it takes no position_ids, which packed inputs need")
    keep_in_float32(model, config.dtype)
    tables = computed_buffers(model, config.device)
    freeze_rope(model, config.max_model_len)
    experts = model.config._experts_implementation
    _set_functions(model, PROBE, "batched_mm")  # the only experts that run without values
    findings = probe(model)
    _set_functions(model, PAGED, experts)
    return model, tables, findings


def _set_functions(model: Any, attention: str, experts: str | None) -> None:
    """Name the functions that all parts of a model call from now on."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = attention
            config._experts_implementation = experts


@cache
def _tell(architecture: str, attentions: int, replaced: tuple[tuple[str, int], ...]) -> None:
    """The one line that says what serves the model, once for equal models."""
    parts = [f"attention in {attentions} layers", *(f"{count} {kind}" for kind, count in replaced)]
    logger.warning(
        "%s is served by the fallback %s: the modules of transformers %s, where ours are %s; "
        "a plugin of its own would be faster: llmfw new --from MODEL",
        architecture,
        NAME,
        transformers.__version__,
        ", ".join(parts),
    )
