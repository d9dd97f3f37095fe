"""`llmfw export`: from a converted checkpoint back to a Hugging Face directory.

Where nothing was lost on the way, every file of weights is written again byte for byte, and its
digest compared with that of the source.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmfw.config import Mapping
from llmfw.config.reading import read_json
from llmfw.errors import CheckpointError, UsageError, WeightError
from llmfw.models.build import build
from llmfw.models.converted import identity_of
from llmfw.models.plans import plan_of
from llmfw.models.prepare import prepare_model
from llmfw.weights import LoadPlan, resolve_model
from llmfw.weights.checked_reader import CheckedCheckpoint
from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.converted import IGNORED, ConvertedCheckpoint, read_checksums
from llmfw.weights.converted_config import (
    HF_FOLDER,
    ConvertedConfig,
    LossyStep,
    read_converted_config,
)
from llmfw.weights.export_files import headers_of, index_text
from llmfw.weights.expressions import Source
from llmfw.weights.gather import Gather
from llmfw.weights.layout import layout_digest
from llmfw.weights.packed import sources_of
from llmfw.weights.safetensors_reader import INDEX_NAME, open_safetensors
from llmfw.weights.safetensors_writer import SafetensorsWriter
from llmfw.weights.source_record import SourceRecord, digest_of, read_source
from llmfw.weights.staging import Staging, unwritable
from llmfw.weights.streaming import Progress
from llmfw.weights.travel import carry_over
from llmfw.weights.writer import scatter


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: The directory.
        files: Its files of weights.
        tensors: How many tensors are in them.
        identical: Whether every file of weights is the source's, byte for byte.
        lossy: What was lost when the checkpoint was converted.
        seconds: Wall time.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    identical: bool
    lossy: tuple[LossyStep, ...]
    seconds: float


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> ExportReport:
    """Write a converted checkpoint (or an engine's) as a Hugging Face directory.

    Args:
        checkpoint: The converted checkpoint, or an engine directory.
        out: The directory to make; it appears whole or not at all.
        progress: Called after each tensor with (bytes done, bytes in all, name).
        **settings: `plugin`, `plugin_modules` and `extensions`, as `prepare_model` takes them.

    Raises:
        UsageError: If it is no converted checkpoint.
        WeightError: If its plugin is there in a version that wants the weights otherwise.
        CheckpointError: If it is damaged, keeps no headers of its source, or `out` is there already
            or cannot be written.
    """
    begin, out = time.perf_counter(), Path(out)
    source = resolve_model(checkpoint)
    if source.kind not in ("checkpoint", "engine"):
        raise UsageError(
            f"{checkpoint}: is no converted checkpoint", hint="llmfw convert MODEL OUT makes one"
        )
    folder = source.checkpoint_path
    config, record = read_converted_config(folder), read_source(folder)
    if record is None:
        raise CheckpointError(
            f"{folder}: keeps no headers of what it was made from (source.json)",
            hint="its writer left no way back; use the model that it was made from",
        )
    plans = _plans(checkpoint, record, config.tp_size, settings)
    exact = not config.lossy
    targets = _targets(folder, plans[0], record, config)
    try:
        with Staging(out, {"export": config.layouts, "source": config.source.digest}) as staging:
            files = _write(staging.folder, folder, plans, record, targets, config, progress)
            carry_over(folder / HF_FOLDER, staging.folder)
            if not exact:
                _tell_changes(staging.folder / "config.json", config)
            if exact:
                _require_identical(staging.folder, record)
            staging.commit()
    except OSError as exc:
        raise unwritable(out, exc) from exc
    seconds = time.perf_counter() - begin
    return ExportReport(out, files, len(targets), exact, config.lossy, seconds)


def _plans(
    checkpoint: str | Path, record: SourceRecord, tp_size: int, settings: dict[str, Any]
) -> list[LoadPlan]:
    """Each rank's plan of loading from the source, made anew from its headers."""
    plans = []
    for rank in range(tp_size):
        mapping = Mapping(world_size=tp_size, rank=rank, tp_size=tp_size)
        prepared = prepare_model(
            checkpoint, device="cpu", kernels="reference", mapping=mapping, **settings
        )
        model = build(prepared.model_config, prepared.host)
        plan = plan_of(prepared, model, record.headers())
        config = read_converted_config(prepared.source.checkpoint_path)
        if not config.layouts or layout_digest(plan) != config.layouts[rank]:
            raise WeightError(
                f"{checkpoint}: was made with {config.plugin.label} and llmfw-core "
                f"{config.core_version}; {identity_of(prepared.resolved).label} maps its weights "
                "otherwise",
                hint=f"install the version that made it: {config.plugin.label}",
            )
        plans.append(plan)
    return plans


def _targets(
    folder: Path, plan: LoadPlan, record: SourceRecord, config: ConvertedConfig
) -> dict[str, TensorInfo]:
    """The tensors to write, by name, with the dtype that each one gets."""
    headers, stored = record.headers(), record.stored_headers()
    if not config.lossy:
        return {name: stored.info(name) for name in stored.names()}
    converted = ConvertedCheckpoint(folder)
    parameters = set(converted.names())
    dtypes: dict[str, torch.dtype] = {}
    for filled in (filled for filled in plan.filled if filled.slot.path in parameters):
        dtype, asked = converted.info(filled.slot.path).dtype, config.converted_dtype is not None
        for source in sources_of(filled):
            dtypes[source.name] = dtype if asked or source.info.is_packed else source.dtype
    if (folder / IGNORED).is_file():
        kept = set(open_safetensors(folder / IGNORED).names())
        for each in (each for each in plan.ignored if each.name in kept):
            dtypes |= {source.name: source.dtype for source in each.expr.sources()}
    infos = {name: headers.info(name) for name in headers.names() if name in dtypes}
    targets = {
        name: TensorInfo(info.shape, dtypes[name], info.file, 0) for name, info in infos.items()
    }
    return {**targets, **{name: stored.info(name) for name in _packed_names(converted)}}


def _packed_names(checkpoint: ConvertedCheckpoint) -> Sequence[str]:
    """The tensors that are written as they are kept."""
    return () if checkpoint.packed is None else checkpoint.packed.stored.names()


def _write(
    out: Path,
    folder: Path,
    plans: Sequence[LoadPlan],
    record: SourceRecord,
    targets: MappingType[str, TensorInfo],
    config: ConvertedConfig,
    progress: Progress | None,
) -> tuple[str, ...]:
    """Writes the files of weights and, where there are several, their index; gives their names."""
    with ExitStack() as stack:
        headers = headers_of(record, targets, config)
        writers: dict[str, SafetensorsWriter] = {}
        for name, header in headers.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            writers[name] = stack.enter_context(SafetensorsWriter(out / name, header))
        place = {tensor: writer for writer in writers.values() for tensor in writer.infos}
        done = 0
        total = sum(info.nbytes for writer in writers.values() for info in writer.infos.values())

        def on_whole(source: Source, value: torch.Tensor) -> None:
            nonlocal done
            info = place[source.name].infos[source.name]
            place[source.name].write(source.name, value.to(info.dtype))
            done += info.nbytes
            if progress is not None:
                progress(done, total, source.name)

        _scatter_all(folder, plans, targets, Gather(on_whole))
    index = index_text(record, {name: writer.infos for name, writer in writers.items()}, config)
    if index is not None:
        (out / INDEX_NAME).write_text(index, encoding="utf-8")
    return tuple(writers)


def _scatter_all(
    folder: Path, plans: Sequence[LoadPlan], targets: MappingType[str, TensorInfo], sink: Gather
) -> None:
    """Takes every parameter apart, all ranks' pieces of it one after the other."""
    ranks = [ConvertedCheckpoint(folder, rank) for rank in range(len(plans))]
    parameters = set(ranks[0].names())  # of all ranks; the others are packed
    by_path = [{filled.slot.path: filled for filled in plan.filled} for plan in plans]
    for first in plans[0].filled:
        path = first.slot.path
        is_cut = any(fill.part.cut is not None for fill in first.fills)
        for rank, filled in zip(ranks, by_path, strict=True):
            if path in parameters and (rank.rank == 0 or is_cut):
                scatter(filled[path], rank.tensor(path), sink)
    if ranks[0].packed is not None:
        stored = ranks[0].packed.stored
        for name in stored.names():
            Source(name, stored.info(name)).scatter(stored.tensor(name), sink)
    if (folder / IGNORED).is_file():
        kept = CheckedCheckpoint(folder / IGNORED, read_checksums(folder).get(IGNORED, {}))
        exprs = {each.name: each.expr for each in plans[0].ignored}
        for name in kept.names():
            exprs[name].scatter(kept.tensor(name), sink)
    missing = sink.incomplete()
    if missing:
        raise WeightError(f"{folder}: holds only a part of {', '.join(missing)}")


def _tell_changes(path: Path, config: ConvertedConfig) -> None:
    """config.json names the dtype that the weights have now, and no packed form of them."""
    raw = read_json(path)
    parts = [raw, *([raw["text_config"]] if isinstance(raw.get("text_config"), dict) else [])]
    for part in parts:
        if any(step.step == "packed" for step in config.lossy):
            part.pop("quantization_config", None)
        named = [key for key in ("dtype", "torch_dtype") if key in part]
        if config.converted_dtype is not None:
            keys = named or (["torch_dtype"] if part is raw else [])
            part |= dict.fromkeys(keys, config.converted_dtype)
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _require_identical(out: Path, record: SourceRecord) -> None:
    for file in record.files:
        if digest_of(out / file.name) != file.sha256:
            raise CheckpointError(
                f"{file.name}: what comes back is not the file that was converted",
                hint="the checkpoint is damaged: convert the model again",
                file=file.name,
            )
