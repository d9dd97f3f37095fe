"""`llmfw build`: a converted checkpoint with all that a start would make: an engine directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmfw import cache
from llmfw.config import Mapping
from llmfw.engine.estimate import graph_plan
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.errors import UsageError
from llmfw.models.convert import convert_checkpoint, state_of
from llmfw.models.converted import converted_config, identity_of
from llmfw.models.engine_dir import CACHE
from llmfw.models.load import LoadedModel, load_model
from llmfw.models.machine import machine_facts
from llmfw.models.manifest import EngineDefaults, EngineManifest, GraphPlan, MemoryPlan
from llmfw.ops.device import as_current
from llmfw.ops.table import OpTable
from llmfw.weights import ModelSource, open_checkpoint, resolve_model
from llmfw.weights.converted_config import HF_FOLDER, is_converted
from llmfw.weights.source_record import digest_of
from llmfw.weights.sources import ENGINE_CHECKPOINT, ENGINE_MANIFEST
from llmfw.weights.staging import Staging, refuse_existing, unwritable
from llmfw.weights.streaming import Progress

_SERVING = ("plugin", "plugin_modules", "fallback", "extensions")
_KEPT = ("kernels/", "configs/")  # what of the cache travels along


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Args:
        path: The engine directory.
        manifest: Its manifest.
        seconds: By what they went to.
    """

    path: Path
    manifest: EngineManifest
    seconds: dict[str, float]


def build_engine(
    model: str | Path,
    out: str | Path,
    *,
    copy: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    kv_cache_memory: int | float | str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> BuildReport:
    """Start a model once, and keep all that the start has made: docs/engine-directory.md.

    Args:
        model: A converted checkpoint; any other model is converted into the engine directory.
        out: The directory to make; it appears whole or not at all.
        copy: Whether the checkpoint is copied into it; a link to it otherwise.
        dtype: What runs of it take; "auto" is the checkpoint's.
        device: Where it is built and will run.
        max_model_len: As `LLM` takes it; becomes what runs of the engine take.
        max_num_seqs: Likewise.
        max_num_batched_tokens: Likewise.
        kv_cache_memory: Likewise.
        progress: Called while weights are converted or loaded: (bytes done, bytes in all, name).
        **settings: `plugin`, `plugin_modules`, `extensions`, `kernels` and `attn_backend`, as
            `prepare_model` takes them.

    Raises:
        UsageError: If `model` is an engine already.
        CheckpointError: If `out` is there already or cannot be written.
        LlmfwError: Any other of the errors of converting and loading.
    """
    out, source = Path(out), resolve_model(model)
    if source.kind == "engine":
        raise UsageError(
            f"{model}: is an engine already", hint=f"build from {source.checkpoint_path}"
        )
    refuse_existing(out)
    converted_config(source, Mapping())  # refuses what is for several ranks, by its own name
    asked = EngineSettings(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
    )
    seconds: dict[str, float] = {}
    try:
        identity = {"build": state_of(open_checkpoint(source.checkpoint_path)), "copy": copy}
        with Staging(out, identity) as staging:
            with _phase("checkpoint", seconds):
                linked = _bring_checkpoint(source, staging, copy, progress, settings)
            with _phase("load", seconds):
                loaded = load_model(
                    staging.folder / ENGINE_CHECKPOINT,
                    dtype=dtype,
                    device=device,
                    max_model_len=max_model_len,
                    progress=progress,
                    **settings,
                )
            with _phase("start", seconds):
                runner = _start(loaded, asked)
            with _phase("write", seconds):
                _bring_cache(staging.folder / CACHE)
                manifest = _manifest_of(loaded, runner, asked, staging.folder, linked)
                file = staging.folder / ENGINE_MANIFEST
                file.write_text(manifest.to_json(), encoding="utf-8")
                staging.commit()
    except OSError as exc:
        raise unwritable(out, exc) from exc
    return BuildReport(out, manifest, seconds)


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Count the time of a part of the work."""
    begin = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begin, 3)


def _bring_checkpoint(
    source: ModelSource,
    staging: Staging,
    copy: bool,
    progress: Progress | None,
    settings: dict[str, Any],
) -> bool:
    """Links, copies or makes the checkpoint; says whether it is a link."""
    target = staging.folder / ENGINE_CHECKPOINT
    if source.kind == "checkpoint" and not copy:
        target.unlink(missing_ok=True)
        here = staging.target.absolute()
        target.symlink_to(os.path.relpath(source.checkpoint_path.resolve(), here.resolve()))
        return True
    if source.kind == "checkpoint":
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source.checkpoint_path, target)
    elif not is_converted(target):
        known = {name: settings[name] for name in _SERVING if name in settings}
        convert_checkpoint(source.name, target, progress=progress, **known)
    return False


def _start(loaded: LoadedModel, asked: EngineSettings) -> ModelRunner:
    """As `LLM` does: it compiles and measures what is still missing, plans memory, makes graphs."""
    config = loaded.model_config
    with as_current(config.device):
        return ModelRunner(
            loaded.model,
            asked.on(config.device.type),
            config.device,
            attn_backend=config.attn_backend,
            max_model_len=config.max_model_len,
        )


def _bring_cache(folder: Path) -> None:
    """Copies what this process has used of the cache."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier process that was killed
    for name, path in cache.used().items():
        if name.startswith(_KEPT) and path.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _manifest_of(
    loaded: LoadedModel,
    runner: ModelRunner,
    asked: EngineSettings,
    folder: Path,
    linked: bool,
) -> EngineManifest:
    config, facts = loaded.model_config, runner.facts()
    weights = sum(each.nbytes for each in loaded.model.parameters())
    checkpoint = folder / ENGINE_CHECKPOINT
    return EngineManifest(
        architecture=str(config.pretrained_config.architectures[0]),
        plugin=identity_of(loaded.resolved),
        core_version=version("llmfw-core"),
        machine=machine_facts(config.device),
        defaults=EngineDefaults(
            dtype=str(config.dtype).removeprefix("torch."),
            max_model_len=asked.max_model_len,
            max_num_seqs=asked.max_num_seqs,
            max_num_batched_tokens=asked.max_num_batched_tokens,
            kv_cache_memory=asked.kv_cache_memory,
        ),
        memory=MemoryPlan(
            weights=weights,
            kv_cache=facts.kv_cache_bytes + facts.state_bytes,
            block_size=facts.block_size,
            num_blocks=facts.num_blocks,
            max_model_len=facts.max_model_len,
            max_num_seqs=facts.max_num_seqs,
        ),
        graphs=GraphPlan()
        if runner.graphs is None
        else graph_plan(facts.max_num_seqs, facts.max_model_len, bool(runner.specs)),
        kernels=kernels_of(config.ops),
        config_digest=f"sha256:{digest_of(checkpoint / HF_FOLDER / 'config.json')}",
        linked=linked,
        files={
            path.relative_to(folder).as_posix(): digest_of(path)
            for path in _described_files(folder)
        },
    )


def kernels_of(ops: OpTable) -> dict[str, tuple[str, ...]]:
    """What each op of a built model runs by."""
    found: dict[str, set[str]] = {}
    for choice in ops.choices.values():
        found.setdefault(choice.context.op, set()).add(choice.chosen)
    return {op: tuple(sorted(names)) for op, names in sorted(found.items())}


def _described_files(folder: Path) -> Iterator[Path]:
    """All files but weights, which have checksums of their own."""
    for top in (folder / CACHE, folder / ENGINE_CHECKPOINT):
        for path in sorted(top.rglob("*")):
            if path.is_file() and path.suffix != ".safetensors":
                yield path
