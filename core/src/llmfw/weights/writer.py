"""Saving: a loaded model's tensors go back to the checkpoint's names, layouts and values."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from llmfw.errors import CheckpointError, WeightError
from llmfw.weights.checkpoint import Checkpoint
from llmfw.weights.gather import Gather
from llmfw.weights.plan import FilledSlot, LoadPlan
from llmfw.weights.safetensors_reader import INDEX_NAME, SINGLE_NAME

logger = logging.getLogger("llmfw.weights")


@dataclass(frozen=True)
class SaveReport:
    """What was saved: files written, tensors in them, ignored tensors that were left out."""

    files: tuple[Path, ...]
    tensors: int
    left_out: tuple[str, ...]


def save_checkpoint(
    model: nn.Module,
    plan: LoadPlan,
    out_dir: str | Path,
    *,
    checkpoint: Checkpoint | None = None,
    max_shard_bytes: int = 5 << 30,
) -> SaveReport:
    """Writes the model as safetensors, with its checkpoint's names and layouts.

    Loaded as "stored", a checkpoint comes back bit for bit. The directory appears whole or not at
    all; one that is there already may hold other files (config, tokenizer) but no weights. Call it
    before anything repacks weights.

    Args:
        model: The loaded model.
        plan: The plan it was loaded by, for one tensor-parallel rank.
        out_dir: Where to write.
        checkpoint: Where to copy the tensors from that the plan ignores; without it they are left
            out.
        max_shard_bytes: Above this, several files with an index are written.

    Raises:
        WeightError: If the plan is one rank's of several, or parts of a tensor have different
            dtypes.
        CheckpointError: If there are weights in `out_dir` already or it cannot be written.
    """
    out_dir = Path(out_dir)
    if plan.tp_size > 1:
        raise WeightError(
            f"this model holds one of {plan.tp_size} ranks' parts",
            hint="load it with one rank to save it",
        )
    if any(out_dir.glob("*.safetensors*")):
        raise CheckpointError(
            f"{out_dir}: there are weights already", hint="choose another directory"
        )
    tensors, left_out = _gather(model, plan, checkpoint)
    if left_out:
        logger.warning("left out of %s: %s", out_dir, ", ".join(left_out))
    ordered = {name: tensors[name] for name in plan.tensor_names if name in tensors}
    try:
        files = _write(out_dir, _shards(ordered, max_shard_bytes))
    except OSError as exc:
        raise CheckpointError(f"{out_dir}: cannot be written: {exc}", file=str(out_dir)) from exc
    return SaveReport(files, len(ordered), left_out)


def _gather(
    model: nn.Module, plan: LoadPlan, checkpoint: Checkpoint | None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    whole: dict[str, torch.Tensor] = {}
    sink = Gather(lambda source, value: whole.update({source.name: value.cpu().contiguous()}))
    for filled in plan.filled:
        _scatter(model, filled, sink)
    for ignored in plan.ignored:
        if checkpoint is not None:
            ignored.expr.scatter(ignored.expr.read(checkpoint), sink)
    partial = sink.incomplete()
    if partial:
        raise WeightError(
            f"only a part of these tensors was loaded: {', '.join(partial)}",
            hint="pass checkpoint=, from which the ignored rest is copied",
        )
    left_out = tuple(name for name in plan.tensor_names if name not in whole)
    return whole, left_out


def _scatter(model: nn.Module, filled: FilledSlot, sink: Gather) -> None:
    value = getattr(model.get_submodule(filled.slot.owner), filled.slot.attribute).detach()
    if tuple(value.shape) != filled.slot.shape:
        raise WeightError(
            f"{filled.slot.path}: its shape is {list(value.shape)} now, "
            f"it was loaded as {list(filled.slot.shape)}",
            hint="save before post_load() or a kernel repacks the weights",
        )
    scatter(filled, value, sink)


def scatter(filled: FilledSlot, value: torch.Tensor, sink: Gather) -> None:
    """Take a parameter apart into what filled it."""
    for fill in filled.fills:
        whole = len(filled.fills) == 1
        part = value if whole else value.narrow(0, fill.part.start, fill.part.rows)
        fill.expr.scatter(part, sink)


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """The tensors in order, in groups of at most `limit` bytes (a larger tensor alone)."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write(out_dir: Path, shards: list[dict[str, torch.Tensor]]) -> tuple[Path, ...]:
    """Writes beside the target, then moves: the whole directory, or its files, index last."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        names = list(_write_files(staging, shards))
        if not out_dir.exists():
            staging.chmod(0o755)
            os.replace(staging, out_dir)
        else:
            for name in names:
                os.replace(staging / name, out_dir / name)
        return tuple(out_dir / name for name in names)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_files(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Iterator[str]:
    """Writes the files and yields their names, the index last."""
    if len(shards) == 1:
        _save(shards[0], folder / SINGLE_NAME)
        yield SINGLE_NAME
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
        yield name
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    yield INDEX_NAME


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)
