"""From a model's name to everything that is known of it before it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmfw.config import Mapping, ModelConfig, architecture_of, read_config_json
from llmfw.config.reading import read_json
from llmfw.models.build import CoreDefaults
from llmfw.models.converted import converted_config, identity_of
from llmfw.models.engine_dir import OpenedEngine, checked_manifest, open_engine
from llmfw.models.settings import (
    choose_device,
    choose_dtype,
    choose_max_model_len,
    stored_dtype,
)
from llmfw.ops.device import device_info
from llmfw.ops.kernel import DeviceInfo
from llmfw.ops.table import OpTable
from llmfw.plugins import (
    Catalog,
    PluginHost,
    ResolvedPlugin,
    collect_kernels,
    load_kernel_packs,
    load_plugin_module,
    resolve_plugin,
)
from llmfw.weights import ModelSource, resolve_model


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
    resolved: ResolvedPlugin
    engine: OpenedEngine | None = None


def prepare_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    plugin: str | None = None,
    plugin_modules: Sequence[str] = (),
    fallback: bool = True,
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
    manifest = None if source.engine_dir is None else checked_manifest(source.engine_dir)
    mapping = mapping or Mapping()
    converted = converted_config(source, mapping)
    raw = read_config_json(source.model_dir)
    architecture = architecture_of(raw, f"{source.model_dir}/config.json")
    catalog = Catalog.scan()
    resolved = resolve_plugin(
        architecture, prefer=plugin, extensions=extensions, catalog=catalog, fallback=fallback
    )
    target = choose_device(device)
    engine = None
    if source.engine_dir is not None and manifest is not None:
        engine = open_engine(source.engine_dir, manifest, target, identity_of(resolved))
        max_model_len = max_model_len or engine.defaults.max_model_len
        dtype = engine.defaults.dtype if dtype == "auto" else dtype
    host = PluginHost(
        resolved.plugin,
        name=resolved.label,
        defaults=CoreDefaults(),
        extensions=resolved.extensions,
    )
    config = host.hook.llmfw_config(raw=raw, model_dir=source.model_dir)
    if not getattr(config, "architectures", None):
        config.architectures = [architecture]
    model_config = ModelConfig(
        pretrained_config=config,
        mapping=mapping,
        dtype=choose_dtype(
            dtype,
            raw if converted is None else {"dtype": converted.dtype},
            partial(stored_dtype, source.checkpoint_path),
        ),
        device=target,
        ops=op_table(host, device_info(target), kernels, catalog),
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
        resolved=resolved,
        engine=engine,
    )


def op_table(
    host: PluginHost, info: DeviceInfo, select: str = "auto", catalog: Catalog | None = None
) -> OpTable:
    """The kernels of the installed packs, the extensions and the model's plugin for a device."""
    catalog = catalog or Catalog.scan()
    wanted = tuple(name for name in select.split(",") if name not in ("auto", "reference", ""))
    packs, _ = load_kernel_packs(info.features, catalog, wanted)
    found, _ = collect_kernels(packs, info, wanted)
    for kernels in host.hook.llmfw_kernels(device=info):
        found += [kernel.from_pack(kernel.pack or host.name) for kernel in kernels or ()]
    return OpTable(info, tuple(found), select)
