"""From a model's name to a model ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmfw.config import Mapping, ModelConfig, architecture_of, read_config_json
from llmfw.config.reading import read_json
from llmfw.errors import UsageError
from llmfw.models.build import CoreDefaults, build
from llmfw.models.pretrained import PretrainedModel
from llmfw.models.settings import choose_device, choose_dtype, choose_max_model_len
from llmfw.models.weights import CheckpointTensors, has_own_load_weights, load_by_author, load_dummy
from llmfw.ops.device import device_info
from llmfw.ops.table import OpTable
from llmfw.plugins import (
    Catalog,
    PluginHost,
    collect_kernels,
    load_kernel_packs,
    load_plugin_module,
    resolve_plugin,
)
from llmfw.weights import (
    LoadReport,
    ModelSource,
    load_weights,
    open_checkpoint,
    plan_weights,
    resolve_model,
)

logger = logging.getLogger("llmfw.models")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and where it came from."""

    model: PretrainedModel[Any]
    model_config: ModelConfig[Any]
    source: ModelSource
    host: PluginHost
    plugin_label: str
    weight_report: LoadReport | None
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedModel:
    """Everything known of a model before it is built: nothing heavy has happened yet."""

    source: ModelSource
    raw_config: dict[str, Any]
    architecture: str
    host: PluginHost
    plugin_label: str
    model_config: ModelConfig[Any]
    generation_config: dict[str, Any]


def prepare_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    plugin: str | None = None,
    plugin_modules: Sequence[str] = (),
    extensions: Sequence[str] = (),
    kernels: str = "auto",
    attn_backend: str = "auto",
    max_model_len: int | None = None,
    block_size: int = 16,
    mapping: Mapping | None = None,
) -> PreparedModel:
    """Find the checkpoint, its plugin and its configuration; arguments as in `load_model`."""
    for module in plugin_modules:
        load_plugin_module(module)
    source = resolve_model(str(model))
    raw = read_config_json(source.model_dir)
    architecture = architecture_of(raw, f"{source.model_dir}/config.json")
    catalog = Catalog.scan()
    resolved = resolve_plugin(architecture, prefer=plugin, extensions=extensions, catalog=catalog)
    host = PluginHost(
        resolved.plugin,
        name=resolved.label,
        defaults=CoreDefaults(),
        extensions=resolved.extensions,
    )
    config = host.hook.llmfw_config(raw=raw, model_dir=source.model_dir)
    if not getattr(config, "architectures", None):
        config.architectures = [architecture]
    target = choose_device(device)
    model_config = ModelConfig(
        pretrained_config=config,
        mapping=mapping or Mapping(),
        dtype=choose_dtype(dtype, raw),
        device=target,
        ops=op_table(host, target, kernels, catalog),
        attn_backend=attn_backend,
        max_model_len=choose_max_model_len(max_model_len, config),
        block_size=block_size,
    )
    generation = source.model_dir / "generation_config.json"
    return PreparedModel(
        source=source,
        raw_config=raw,
        architecture=architecture,
        host=host,
        plugin_label=resolved.label,
        model_config=model_config,
        generation_config=read_json(generation) if generation.is_file() else {},
    )


def load_model(
    model: str | Path,
    *,
    load_format: str = "auto",
    threads: int = 1,
    progress: Progress | None = None,
    seed: int = 0,
    **settings: Any,
) -> LoadedModel:
    """Find, build and load a model.

    Args:
        model: A directory, a GGUF file, a hub id or an alias.
        load_format: "auto" reads the checkpoint, "dummy" fills random weights from the
            configuration alone.
        threads: How many threads read the checkpoint.
        progress: Called with (bytes done, bytes in all, name of the parameter).
        seed: Of dummy weights.
        **settings: `dtype`, `device`, `plugin`, `plugin_modules`, `extensions`, `kernels`,
            `attn_backend`, `max_model_len`, `block_size`, `mapping`, as `prepare_model` takes them.

    Raises:
        ConfigError: If the model or its configuration cannot be read.
        PluginError: If no plugin serves it, several do, or its plugin is broken.
        CheckpointError: If a file of weights cannot be read.
        WeightError: If tensors and parameters do not fit.
    """
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"load_format {load_format!r} is not known", hint="known: auto, dummy")
    prepared = prepare_model(model, **settings)
    built = build(prepared.model_config, prepared.host)
    report: LoadReport | None = None
    if load_format == "dummy":
        load_dummy(built, seed)
    else:
        report = _load_checkpoint(built, prepared, threads, progress)
    logger.info("%s is served by %s", prepared.architecture, prepared.plugin_label)
    return LoadedModel(
        model=built,
        model_config=built.model_config,
        source=prepared.source,
        host=prepared.host,
        plugin_label=prepared.plugin_label,
        weight_report=report,
        generation_config=prepared.generation_config,
    )


def op_table(host: PluginHost, device: torch.device, select: str, catalog: Catalog) -> OpTable:
    """The kernels of the installed packs, the extensions and the model's plugin."""
    info = device_info(device)
    wanted = tuple(name for name in select.split(",") if name not in ("auto", "reference", ""))
    packs, _ = load_kernel_packs(info.features, catalog, wanted)
    found, _ = collect_kernels(packs, info, wanted)
    for kernels in host.hook.llmfw_kernels(device=info):
        found += [kernel.from_pack(kernel.pack or host.name) for kernel in kernels or ()]
    return OpTable(info, tuple(found), select)


def _load_checkpoint(
    model: PretrainedModel[Any],
    prepared: PreparedModel,
    threads: int,
    progress: Progress | None,
) -> LoadReport | None:
    checkpoint = open_checkpoint(prepared.source.checkpoint_path)
    if has_own_load_weights(model):
        load_by_author(model, CheckpointTensors(checkpoint))
        return None
    config = model.model_config
    weight_map = prepared.host.hook.llmfw_weight_map(model_config=config, checkpoint=checkpoint)
    plan = plan_weights(model, checkpoint, weight_map, config.mapping)
    return load_weights(
        model,
        plan,
        checkpoint,
        device=config.device,
        threads=threads,
        progress=progress,
    )
