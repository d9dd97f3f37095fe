"""The files of an export: which tensors go into which, their headers and their index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.converted_config import ConvertedConfig
from llmfw.weights.safetensors_reader import SINGLE_NAME
from llmfw.weights.safetensors_writer import header_text
from llmfw.weights.source_record import SourceRecord

_MAX_SHARD = 5 << 30


def headers_of(
    record: SourceRecord, targets: Mapping[str, TensorInfo], config: ConvertedConfig
) -> dict[str, bytes]:
    """The header of each file that is written.

    Where nothing was lost they are the source's own; else they describe `targets`, in files as the
    source had them, or in new ones where tensors were dequantised.

    Args:
        record: The source's headers.
        targets: The tensors to write, by name.
        config: What was lost.
    """
    if not config.lossy:
        return {file.name: file.header.encode() for file in record.files}
    if any(step.step in ("packed", "gguf") for step in config.lossy):
        shards = _new_shards(targets)
    else:
        of = {Path(file.name).name: file.name for file in record.files}
        shards = {}
        for name, info in targets.items():
            shards.setdefault(of[info.file], []).append(name)
    return {
        file: header_text({name: (targets[name].shape, targets[name].dtype) for name in names})
        for file, names in shards.items()
    }


def _new_shards(targets: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in targets.items():
        nbytes = torch.Size(info.shape).numel() * info.dtype.itemsize
        if groups[-1] and size + nbytes > _MAX_SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def index_text(
    record: SourceRecord, files: Mapping[str, Mapping[str, TensorInfo]], config: ConvertedConfig
) -> str | None:
    """The index: the source's own where nothing was lost, else one of these files; None: none.

    Args:
        record: The source's headers and index.
        files: The tensors of each file that was written.
        config: What was lost.
    """
    if not config.lossy:
        return record.index
    if record.index is None and len(files) == 1:
        return None
    names = {tensor: file for file, infos in files.items() for tensor in infos}
    total = sum(info.nbytes for infos in files.values() for info in infos.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"
