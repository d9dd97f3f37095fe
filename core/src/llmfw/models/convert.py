"""`llmfw convert`: a model's weights, fused and cut for its modules, in a directory of our own.

Tensors stream through one at a time; packed ones stay packed. The work of a process that was killed
is kept and gone on with; the directory appears in one step, when all of it is there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmfw.config import Mapping
from llmfw.errors import CheckpointError, UsageError, WeightError
from llmfw.models.build import build
from llmfw.models.converted import identity_of
from llmfw.models.plans import open_weights, plan_of
from llmfw.models.prepare import PreparedModel, prepare_model
from llmfw.models.settings import choose_dtype
from llmfw.models.weights import has_own_load_weights
from llmfw.weights import Checkpoint, LoadPlan
from llmfw.weights.converted import CHECKSUMS, IGNORED, rank_file
from llmfw.weights.converted_config import HF_FOLDER, ConvertedConfig, LossyStep, SourceSummary
from llmfw.weights.dequantising import Dequantising
from llmfw.weights.layout import layout_digest
from llmfw.weights.loader import loaded_dtype, read_parameter, stored_dtype
from llmfw.weights.packed import PACKED, kept_packed, sources_of, stays
from llmfw.weights.plan import FilledSlot, dtype_text, stored_as
from llmfw.weights.safetensors_reader import INDEX_NAME
from llmfw.weights.source_record import NAME as SOURCE_NAME
from llmfw.weights.source_record import files_of, record_source
from llmfw.weights.staging import Staging, refuse_existing, unwritable, write_json
from llmfw.weights.streaming import SYNC_BYTES, PendingTensor, Progress, stream_tensors
from llmfw.weights.travel import carry_over

#: What is not converted again.
_KINDS = {"checkpoint": "a converted checkpoint", "engine": "an engine"}


@dataclass(frozen=True)
class ConvertReport:
    """What was converted.

    Args:
        path: The directory.
        config: Its config.json.
        tensors: Parameters of all ranks.
        nbytes: Bytes of their files and of the ignored tensors'.
        resumed: Tensors that an earlier process had done.
        seconds: Wall time of this process.
    """

    path: Path
    config: ConvertedConfig
    tensors: int
    nbytes: int
    resumed: int
    seconds: float


def convert_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    mapping: Mapping | None = None,
    keep_ignored: bool = True,
    progress: Progress | None = None,
    sync_bytes: int = SYNC_BYTES,
    **settings: Any,
) -> ConvertReport:
    """Write a model as a converted checkpoint: docs/checkpoint-format.md.

    Args:
        model: A Hugging Face directory, a GGUF file, an alias or a hub id.
        out: The directory to make.
        dtype: "auto" leaves each tensor in its own, packed ones (MXFP4, float8) as they are; those
            of a GGUF file are dequantised into the model's. Any other converts all floating-point
            parameters, also packed ones, and the checkpoint says so.
        mapping: Sizes of the parallel run that it is for; all ranks are written.
        keep_ignored: Whether tensors that the model does not take are kept in a side file.
        progress: Called after each tensor with (bytes done, bytes in all, name).
        sync_bytes: How much is written between two entries of the journal.
        **settings: `plugin`, `plugin_modules`, `fallback` and `extensions`, as `prepare_model`
            takes them.

    Raises:
        UsageError: For more than one pipeline stage.
        WeightError: If tensors and parameters do not fit, or the model loads its weights itself.
        CheckpointError: If the source cannot be read, `out` is there already, or the disk is full.
        LlmfwError: Any other of the errors of `prepare_model`.
    """
    begin, out = time.perf_counter(), Path(out)
    mapping = mapping or Mapping()
    if mapping.pp_size > 1:
        raise UsageError(
            f"{mapping.pp_size} pipeline stages: models are not cut into stages yet",
            hint="leave --pp out; --tp cuts each layer",
        )
    refuse_existing(out)
    asked = None if dtype == "auto" else choose_dtype(dtype, {})
    ranks = list(_ranks(model, asked, mapping, settings))
    prepared, checkpoint = ranks[0].prepared, ranks[0].checkpoint
    packed = _kept_packed(ranks, asked, keep_ignored)
    files = {rank_file(rank.number): list(rank.tensors(asked, packed)) for rank in ranks}
    beside = {PACKED: list(_stored(checkpoint, packed))}
    beside[IGNORED] = list(ranks[0].ignored(packed)) if keep_ignored else []
    files |= {name: tensors for name, tensors in beside.items() if tensors}
    state = state_of(checkpoint)
    identity = {
        "source": state,
        "plugin": identity_of(prepared.resolved).label,
        "core": version("llmfw-core"),
        "dtype": None if asked is None else dtype_text(asked),
        "layouts": [layout_digest(rank.plan) for rank in ranks],
        "files": list(files),
    }
    try:
        with Staging(out, identity) as staging:
            resumed = len(staging.done)
            checksums = stream_tensors(staging, files, progress, sync_bytes)
            config = _complete(staging.folder, ranks, asked, keep_ignored, packed, checksums)
            if state_of(checkpoint) != state:
                raise CheckpointError(
                    f"{checkpoint.path}: was changed while it was converted", hint="convert again"
                )
            (staging.folder / "config.json").write_text(config.to_json(), encoding="utf-8")
            staging.commit()
    except OSError as exc:
        raise unwritable(out, exc) from exc
    tensors = sum(len(rank.plan.filled) for rank in ranks)
    nbytes = sum(tensor.nbytes for each in files.values() for tensor in each)
    return ConvertReport(out, config, tensors, nbytes, resumed, time.perf_counter() - begin)


def _complete(
    folder: Path,
    ranks: Sequence[_Rank],
    asked: torch.dtype | None,
    keep_ignored: bool,
    packed: frozenset[str],
    checksums: dict[str, dict[str, str]],
) -> ConvertedConfig:
    """Writes all files but weights and config.json, whose contents it gives back."""
    record = record_source(ranks[0].checkpoint)
    known = {INDEX_NAME, *(file.name for file in record.files)}
    left_behind = carry_over(ranks[0].prepared.source.model_dir, folder / HF_FOLDER, known)
    (folder / SOURCE_NAME).write_text(record.to_json(), encoding="utf-8")
    write_json(folder / CHECKSUMS, checksums)
    lossy = tuple(_lossy(ranks[0], asked, keep_ignored, packed))
    return replace(
        _config_of(ranks, asked, record.digest),
        packed=record.format if packed else None,
        lossy=lossy,
        left_behind=left_behind,
    )


@dataclass(frozen=True)
class _Rank:
    """What one rank of the run is filled from."""

    number: int
    prepared: PreparedModel
    checkpoint: Checkpoint
    plan: LoadPlan

    def tensors(self, asked: torch.dtype | None, packed: frozenset[str]) -> Iterator[PendingTensor]:
        """Its parameters, in the order of the source's files; not those that stay packed."""
        for filled in self.plan.filled:
            if stays(sources_of(filled), packed):
                continue
            dtype = _written_dtype(filled, asked)
            read = partial(read_parameter, filled, self.checkpoint, dtype)
            yield PendingTensor(filled.slot.path, filled.slot.shape, dtype, read)

    def ignored(self, packed: frozenset[str]) -> Iterator[PendingTensor]:
        """What it does not take, and does not stay packed."""
        for each in self.plan.ignored:
            if stays(each.expr.sources(), packed):
                continue
            read = partial(each.expr.read, self.checkpoint)
            yield PendingTensor(each.name, each.expr.shape, each.expr.dtype, read)


def _kept_packed(
    ranks: Sequence[_Rank], asked: torch.dtype | None, keep_ignored: bool
) -> frozenset[str]:
    """The source's tensors that stay packed: those in safetensors, unless a dtype is asked for."""
    checkpoint = ranks[0].checkpoint
    stays = isinstance(checkpoint, Dequantising) and asked is None
    return kept_packed([rank.plan for rank in ranks], keep_ignored) if stays else frozenset()


def _stored(checkpoint: Checkpoint, packed: frozenset[str]) -> Iterator[PendingTensor]:
    """The stored form of tensors that stay packed, in the order of the source's files."""
    if isinstance(checkpoint, Dequantising):
        for name in (name for name in checkpoint.names() if name in packed):
            for each in checkpoint.stored_names(name):
                info = checkpoint.stored.info(each)
                read = partial(checkpoint.stored.tensor, each)
                yield PendingTensor(each, info.shape, info.dtype, read)


def _ranks(
    model: str | Path, asked: torch.dtype | None, mapping: Mapping, settings: dict[str, Any]
) -> Iterator[_Rank]:
    for number in range(mapping.world_size):
        prepared = prepare_model(
            model,
            dtype="auto" if asked is None else asked,
            device="cpu",
            kernels="reference",
            mapping=replace(mapping, rank=number),
            **settings,
        )
        if prepared.source.kind in _KINDS:
            raise UsageError(
                f"{model}: is {_KINDS[prepared.source.kind]} already",
                hint="llmfw export gives back what it was converted from",
            )
        built = build(prepared.model_config, prepared.host)
        if has_own_load_weights(built):
            raise WeightError(
                f"{type(built).__name__} loads its weights by a load_weights of its own, "
                "which cannot be told in advance",
                hint="give the plugin a weight map in its place (docs/plugins/weights.md), or run "
                "the model without converting it",
            )
        checkpoint = open_weights(prepared)
        yield _Rank(number, prepared, checkpoint, plan_of(prepared, built, checkpoint))


def _written_dtype(filled: FilledSlot, asked: torch.dtype | None) -> torch.dtype:
    """As asked; else the tensors' own, and the model's for what is dequantised."""
    if asked is not None:
        return loaded_dtype(filled, asked)
    return loaded_dtype(filled, "declared") if _is_packed(filled) else stored_dtype(filled)


def _is_packed(filled: FilledSlot) -> bool:
    return any(source.info.is_packed for source in sources_of(filled))


def state_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """What shows that the source's files have not changed, without reading them."""
    stats = [(path, path.stat()) for path in files_of(checkpoint)]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _config_of(ranks: Sequence[_Rank], asked: torch.dtype | None, digest: str) -> ConvertedConfig:
    first = ranks[0]
    prepared, plan = first.prepared, first.plan
    mapping = prepared.model_config.mapping
    source = prepared.source
    kinds = {each.slot.path: each.dtype for each in plan.filled if each.dtype is not None}
    return ConvertedConfig(
        architecture=prepared.architecture,
        dtype=dtype_text(prepared.model_config.dtype),
        plugin=identity_of(prepared.resolved),
        core_version=version("llmfw-core"),
        source=SourceSummary(Path(source.name).name, source.kind, digest),
        tp_size=mapping.tp_size,
        pp_size=mapping.pp_size,
        quantization=prepared.model_config.quant_config,
        converted_dtype=None if asked is None else dtype_text(asked),
        layouts=tuple(layout_digest(rank.plan) for rank in ranks),
        parameter_dtypes={path: dtype_text(dtype) for path, dtype in kinds.items()},
        ties=plan.ties,
    )


def _lossy(
    rank: _Rank, asked: torch.dtype | None, keep_ignored: bool, packed: frozenset[str]
) -> Iterator[LossyStep]:
    """What an export will not give back."""
    source, plan = rank.prepared.source, rank.plan
    if source.gguf is not None:
        yield LossyStep("gguf", f"{source.gguf.name} was dequantised and is no GGUF file any more")
    changed: Counter[tuple[str, str]] = Counter()
    for filled in plan.filled:
        if stays(sources_of(filled), packed):
            continue
        dtype = _written_dtype(filled, asked)
        for fill in filled.fills:
            step = "packed" if _is_packed(filled) else "dtype"
            if step == "packed" or (fill.expr.dtype != dtype and dtype != stored_dtype(filled)):
                changed[step, f"{stored_as(fill.expr)[0]} to {dtype_text(dtype)}"] += 1
    for (step, change), count in changed.items():
        yield LossyStep(step, f"{count} tensors from {change}")
    if plan.ignored and not keep_ignored:
        names = ", ".join(each.name for each in plan.ignored[:4])
        more = f" and {len(plan.ignored) - 4} more" if len(plan.ignored) > 4 else ""
        yield LossyStep("ignored", f"not kept: {names}{more}")
