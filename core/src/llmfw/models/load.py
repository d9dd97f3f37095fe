"""From a model's name to a model ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmfw.config import ModelConfig
from llmfw.errors import UsageError
from llmfw.models.build import build
from llmfw.models.engine_dir import OpenedEngine
from llmfw.models.plans import open_weights, plan_of
from llmfw.models.prepare import PreparedModel, prepare_model
from llmfw.models.pretrained import PretrainedModel
from llmfw.models.weights import CheckpointTensors, has_own_load_weights, load_by_author, load_dummy
from llmfw.ops.device import as_current
from llmfw.ops.memory import memory_for
from llmfw.phases import Phases
from llmfw.plugins import PluginHost, ResolvedPlugin
from llmfw.weights import LoadReport, ModelSource, load_weights
from llmfw.weights.converted import ConvertedCheckpoint

logger = logging.getLogger("llmfw.models")

Progress = Callable[[int, int, str], None]

_CURES = (
    "load a smaller dtype (bfloat16 takes half of float32) or a quantised checkpoint",
    "or end what else uses the device, or choose a larger one",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and where it came from; `engine` where that was an engine directory."""

    model: PretrainedModel[Any]
    model_config: ModelConfig[Any]
    source: ModelSource
    host: PluginHost
    resolved: ResolvedPlugin
    plugin_label: str
    weight_report: LoadReport | None
    generation_config: dict[str, Any] = field(default_factory=dict)
    engine: OpenedEngine | None = None


def load_model(
    model: str | Path,
    *,
    load_format: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    phases: Phases | None = None,
    **settings: Any,
) -> LoadedModel:
    """Find, build and load a model.

    Args:
        model: A directory, a GGUF file, a hub id or an alias.
        load_format: "auto" reads the checkpoint, "dummy" fills random weights from the
            configuration alone.
        threads: How many threads read the checkpoint; settled by the machine when left out.
        progress: Called with (bytes done, bytes in all, name of the parameter).
        seed: Of dummy weights.
        phases: Takes the seconds of "resolve", "build" and "weights".
        **settings: `dtype`, `device`, `plugin`, `plugin_modules`, `fallback`, `extensions`,
            `kernels`, `attn_backend`, `max_model_len`, `block_size`, `mapping`, as `prepare_model`
            takes them.

    Raises:
        ConfigError: If the model or its configuration cannot be read.
        PluginError: If no plugin serves it, several do, or its plugin is broken.
        CheckpointError: If a file of weights cannot be read.
        WeightError: If tensors and parameters do not fit.
        DeviceError: If the device has too little memory for the weights.
    """
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"load_format {load_format!r} is not known", hint="known: auto, dummy")
    phases = phases or Phases()
    with phases.measure("resolve"):
        prepared = prepare_model(model, **settings)
    report: LoadReport | None = None
    device = prepared.model_config.device
    with phases.measure("build"), as_current(device):
        built = build(prepared.model_config, prepared.host)
    with (
        phases.measure("weights"),
        as_current(device),
        memory_for("the weights", device, *_CURES),
    ):
        if load_format == "dummy":
            load_dummy(built, seed)
        else:
            report = _load_checkpoint(built, prepared, threads, progress)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    logger.info("%s is served by %s", prepared.architecture, prepared.plugin_label)
    return LoadedModel(
        model=built,
        model_config=built.model_config,
        source=prepared.source,
        host=prepared.host,
        resolved=prepared.resolved,
        plugin_label=prepared.plugin_label,
        weight_report=report,
        generation_config=prepared.generation_config,
        engine=prepared.engine,
    )


def _load_checkpoint(
    model: PretrainedModel[Any],
    prepared: PreparedModel,
    threads: int | None,
    progress: Progress | None,
) -> LoadReport | None:
    checkpoint = open_weights(prepared)
    if has_own_load_weights(model) and checkpoint.format != ConvertedCheckpoint.format:
        load_by_author(model, CheckpointTensors(checkpoint))
        return None
    return load_weights(
        model,
        plan_of(prepared, model, checkpoint),
        checkpoint,
        device=model.model_config.device,
        threads=threads,
        progress=progress,
    )
