"""Tiny GGUF files written from HF models, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

SIZES = {
    "context_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
BYTES = [chr(256 + n) if n < 33 else chr(n) for n in range(128)]
TOKENS = ["<unk>", "<s>", "</s>", *sorted(set(BYTES)), "ab", "abc", "12"]
MERGES = ["a b", "ab c", "1 2"]


def to_ggml_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k rows (LlamaModel.permute)."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    tensors: dict[str, torch.Tensor],
    *,
    arch: str = "llama",
    quantise: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    sizes: dict[str, int] | None = None,
    tokenizer: str | None = "gpt2",
) -> Path:
    """Writes tensors under ggml's names; `quantise` gives some of them a ggml type."""
    writer = gguf.GGUFWriter(file, arch)
    for key, size in {**SIZES, **(sizes or {})}.items():
        writer.add_uint32(f"{arch}.{key}", size)
    if f"{arch}.attention.layer_norm_epsilon" not in (metadata or {}):
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        kind = (quantise or {}).get(name, "F32")
        values = tensor.float().numpy()
        if kind == "F32":
            writer.add_tensor(name, values)
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            ggml_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3, *[1] * (len(TOKENS) - 3)])
    if kind == "gpt2":
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def decoder_tensors(seed: int = 0, *, tied: bool = True) -> dict[str, torch.Tensor]:
    """A decoder of `SIZES` under ggml's names, its values exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    tensors = {"token_embd.weight": draw(len(TOKENS), 64), "output_norm.weight": draw(64)}
    for block in range(2):
        shapes = {
            "attn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
            "ffn_norm": (64,),
            "ffn_gate": (96, 64),
            "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }
        for name, shape in shapes.items():
            tensors[f"blk.{block}.{name}.weight"] = draw(*shape)
    if not tied:
        tensors["output.weight"] = draw(len(TOKENS), 64)
    return tensors
