"""GGUF files as checkpoints: HF's names and layouts, values dequantised when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import TensorInfo
from llmfw.weights.expressions import reorder
from llmfw.weights.gguf_header import GGUFEntry, GGUFHeader, read_gguf_header
from llmfw.weights.gguf_tables import (
    FAMILIES,
    ONE_ROW,
    SETTINGS,
    SIGMOID,
    WITH_EXPERTS,
    WITH_NORMS,
    WITH_SIGMOID,
    Family,
)

_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def family_of(file: Path, header: GGUFHeader) -> Family:
    """The row of the format tables for this file.

    Raises:
        CheckpointError: If its architecture is not in the tables, or it is one part of several.
    """
    name = str(header.metadata.get("general.architecture"))
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file}: GGUF architecture {name!r} is not served; these are: {', '.join(FAMILIES)}",
            hint="use the model's safetensors, or add its row to llmfw/weights/gguf_tables.py",
            file=str(file),
        )
    if header.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file}: is one of {header.metadata['split.count']} parts",
            hint="merge them with llama.cpp's `llama-gguf-split --merge`",
            file=str(file),
        )
    if name in WITH_EXPERTS and header.metadata.get(f"{name}.expert_count", 0):
        return WITH_EXPERTS[name]
    if name in WITH_SIGMOID and header.metadata.get(f"{name}.expert_gating_func") == SIGMOID:
        return WITH_SIGMOID[name]
    if name in WITH_NORMS and header.metadata.get(f"{name}.ssm.dt_b_c_rms"):
        return WITH_NORMS[name]
    return FAMILIES[name]


class GGUFCheckpoint:
    """The tensors of a GGUF file under HF's names and in HF's layouts.

    A quantised tensor shows as float32; F16 and BF16 keep their dtype. A model with tied embeddings
    has no `lm_head.weight`. Rotary factors that belong to the config are not shown.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is damaged, or its architecture is not in the format tables.
    """

    format = "gguf"

    def __init__(self, path: Path, header: GGUFHeader | None = None) -> None:
        self.path = path
        self.header = header or read_gguf_header(path)
        self.family = family_of(path, self.header)
        self._entries = {
            _hf_name(name, self.family): _reshaped(entry, self.family)
            for name, entry in self.header.tensors.items()
            if name not in SETTINGS
        }
        self._halves = dict(self._joined())

    def names(self) -> Sequence[str]:
        """All HF names, in the order of the file."""
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as `tensor` gives them; `stored` is ggml's type."""
        if name in self._halves:
            return self._joined_info(name)
        entry = self._entry(name)
        dtype = _PLAIN.get(entry.type_name, torch.float32)
        if self._is_norm(name):
            dtype = torch.float32
        shape = entry.shape[::-1] if self._is_transposed(entry) else entry.shape
        return TensorInfo(shape, dtype, self.path.name, entry.nbytes, entry.type_name)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, dequantised and in HF's layout."""
        if name in self._halves:
            first, second = (self._whole(half).float() for half in self._halves[name])
            return torch.cat((first.transpose(1, 2), second), 1).flatten(0, 1)
        entry = self._entry(name)
        value = self._whole(entry)
        order = self._row_order(entry)
        if order is not None:
            value = reorder(value, 0, *order)
        return value.t().contiguous() if self._is_transposed(entry) else value

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of it; along dimension 0 only those rows are dequantised where that can be."""
        if name in self._halves:
            return self.tensor(name).narrow(dim, start, stop - start)
        entry = self._entry(name)
        if dim == 0 and self._row_order(entry) is None and not self._is_transposed(entry):
            return self._dequantised(entry, start, stop)
        return self.tensor(name).narrow(dim, start, stop - start)

    def stays_float32(self, name: str) -> bool:
        """Whether it decides by exponents, so that rounding it tells more than that of weights."""
        return _stem(self._entry(name)) in self.family.float32

    def setting(self, name: str) -> torch.Tensor | None:
        """A tensor that belongs to the config, such as rotary factors; None where it is not."""
        entry = self.header.tensors.get(name)
        return None if entry is None else self._whole(entry)

    def _joined(self) -> Iterator[tuple[str, tuple[GGUFEntry, GGUFEntry]]]:
        """HF's tensors that the file has in two; the first half's place is theirs."""
        for ours, (first, second) in self.family.joined.items():
            for name in [name for name in self._entries if name.endswith(f".{first}.weight")]:
                other = name.replace(first, second)
                if other not in self._entries:
                    continue  # the plan names what is left
                block = name.split(".")[1]
                joined = f"{self.family.layer}.{block}.{ours}.weight"
                halves = self._entries[name], self._entries.pop(other)
                self._entries = {
                    joined if each == name else each: entry for each, entry in self._entries.items()
                }
                yield joined, halves

    def _joined_info(self, name: str) -> TensorInfo:
        first, second = self._halves[name]
        heads, rank, width = first.shape
        shape = (heads * (width + second.shape[1]), rank)
        stored = "+".join(dict.fromkeys((first.type_name, second.type_name)))
        nbytes = first.nbytes + second.nbytes
        return TensorInfo(shape, torch.float32, self.path.name, nbytes, stored)

    def _whole(self, entry: GGUFEntry) -> torch.Tensor:
        return self._dequantised(entry, 0, entry.shape[0])

    def _entry(self, name: str) -> GGUFEntry:
        if name not in self._entries:
            raise CheckpointError(f"no tensor '{name}' in {self.path}", tensor=name)
        return self._entries[name]

    def _is_norm(self, name: str) -> bool:
        return self.family.norm_offset != 0 and name.endswith("norm.weight")

    def _is_transposed(self, entry: GGUFEntry) -> bool:
        return len(entry.shape) == 2 and _stem(entry) in self.family.transposed

    def _row_order(self, entry: GGUFEntry) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """How rows are seen and permuted to be HF's (as for `reorder`); None where they are."""
        stem = _stem(entry)
        if self.family.permuted_heads and stem in ("attn_q", "attn_k"):
            heads = self._heads(entry, 2)
            return (heads, entry.shape[0] // heads // 2, 2), (0, 2, 1)
        if self.family.qkv_by_head and stem == "attn_qkv":
            heads = self._heads(entry, 3)
            return (3, heads, entry.shape[0] // heads // 3), (1, 0, 2)
        return None

    def _heads(self, entry: GGUFEntry, parts: int) -> int:
        """Number of heads of a tensor, each of which has rows in so many parts."""
        stem = _stem(entry)
        prefix = f"{self.header.metadata['general.architecture']}.attention."
        heads = self.header.metadata.get(f"{prefix}head_count")
        if stem == "attn_k":
            heads = self.header.metadata.get(f"{prefix}head_count_kv", heads)
        if not isinstance(heads, int) or heads <= 0 or entry.shape[0] % (parts * heads):
            raise CheckpointError(
                f"{self.path}: tensor '{entry.name}': {entry.shape[0]} rows do not divide by "
                f"{heads} heads",
                hint="download it again",
                tensor=entry.name,
                file=str(self.path),
            )
        return heads

    def _dequantised(self, entry: GGUFEntry, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of dimension 0."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        row_bytes = entry.nbytes // entry.shape[0]
        raw = self._bytes(entry, start * row_bytes, stop * row_bytes)
        shape = (stop - start, *entry.shape[1:])
        if entry.type_name in _PLAIN:
            plain = torch.from_numpy(raw).view(_PLAIN[entry.type_name]).reshape(shape)
            return plain.float() - self.family.norm_offset if self._shifted(entry) else plain
        if entry.type_name == "F32":
            value = torch.from_numpy(raw).view(torch.float32).reshape(shape)
            if _stem(entry) in self.family.exponents:
                return value.neg().log()
        else:
            kind = GGMLQuantizationType[entry.type_name]
            try:
                blocks = raw.reshape(-1, entry.nbytes * entry.shape[-1] // _numel(entry.shape))
                value = torch.from_numpy(dequantize(blocks, kind)).reshape(shape)
            except NotImplementedError as exc:
                raise CheckpointError(
                    f"{self.path}: tensor '{entry.name}': gguf cannot dequantise {entry.type_name}",
                    hint="use another quantisation of this model",
                    tensor=entry.name,
                ) from exc
        return value - self.family.norm_offset if self._shifted(entry) else value

    def _bytes(self, entry: GGUFEntry, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes [start, stop) of a tensor's data: read, not mapped, so that they can be let go."""
        try:
            raw = np.fromfile(self.path, np.uint8, stop - start, offset=entry.offset + start)
        except OSError as exc:
            raise self._unreadable(entry, exc.strerror or str(exc)) from exc
        if raw.size != stop - start:
            raise self._unreadable(entry, "the file has become shorter")
        return raw

    def _unreadable(self, entry: GGUFEntry, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor '{entry.name}': cannot be read: {why}",
            hint="leave the file alone while it is loaded",
            tensor=entry.name,
            file=str(self.path),
        )

    def _shifted(self, entry: GGUFEntry) -> bool:
        return self._is_norm(entry.name)


def _stem(entry: GGUFEntry) -> str:
    """ "attn_q" of "blk.3.attn_q.weight", "ssm_a" of "blk.3.ssm_a"."""
    parts = entry.name.split(".")
    return parts[2] if parts[0] == "blk" and len(parts) > 2 else parts[0]


def _reshaped(entry: GGUFEntry, family: Family) -> GGUFEntry:
    """The entry in HF's number of dimensions."""
    stem, shape = _stem(entry), entry.shape
    if stem in ONE_ROW and len(shape) == 1:
        shape = (1, *shape)
    elif stem in family.flat:
        shape = (_numel(shape),)
    elif stem in family.taps and len(shape) == 2:
        shape = (shape[0], 1, shape[1])
    return replace(entry, shape=shape)


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _hf_name(name: str, family: Family) -> str:
    """HF's name for ggml's; one that the tables lack stays, and the load plan will name it."""
    stem, _, suffix = name.rpartition(".")
    if stem in family.top:
        return f"{family.top[stem]}.{suffix}"
    if name.count(".") == 2:  # ggml has some without an ending
        stem, suffix = name, ""
    parts = stem.split(".")
    if len(parts) != 3 or parts[0] != "blk":
        return name
    layer = f"{family.layer}.{parts[1]}"
    if f"{parts[2]}.{suffix}" in family.block:
        return f"{layer}.{family.block[f'{parts[2]}.{suffix}']}"
    if parts[2] in family.block:
        return f"{layer}.{family.block[parts[2]]}.{suffix}".rstrip(".")
    return name
