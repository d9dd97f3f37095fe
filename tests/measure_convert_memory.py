"""How much memory converting takes: `tests/measure_convert_memory.py [--dtype float16] [--packed]`.

Converts and exports a checkpoint of a stock decoder that it makes in a temporary directory, and
prints a line of JSON for each: bytes of the model and of its largest parameter, and the peak of
this process's resident memory (anonymous and mapped) above what it was before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmfw.models.convert import convert_checkpoint
from llmfw.models.export import export_checkpoint
from llmfw.weights import Checkpoint, open_checkpoint
from llmfw.weights.source_record import stored_of
from measure_load_memory import PeakWatch

LAYERS, WIDTH = 6, 1024


def write_model(folder: Path, width: int, packed: bool) -> None:
    """A model in bfloat16, in one file a layer: 218 MB with the width 1024.

    Packed, the layers' matrices are in float8 with a scale for each block: 118 MB.
    """
    inner, vocab = 4 * width, 8 * width
    square = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    wide = {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    norms = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    layer = {**square, **wide, "mlp.down_proj": (width, inner), **norms}
    folder.mkdir()
    for index in range(LAYERS):
        shapes = {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        if index == 0:
            shapes |= {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for name in [name for name in tensors if packed and "_proj" in name]:
            blocks = [-(-size // 128) for size in tensors[name].shape]
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(blocks)
        save_file(tensors, folder / f"model-{index + 1:05d}-of-{LAYERS:05d}.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def watched(work: Callable[[], object]) -> int:
    """Bytes that the resident memory rose by while `work` ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left free would hide what this takes
    watch = PeakWatch()
    watch.start()
    work()
    watch.done = True
    watch.join()
    return watch.peak - watch.before


def names_of(checkpoint: Checkpoint) -> Sequence[str]:
    """The tensors in a file, as they are stored."""
    return stored_of(checkpoint).names()


def main() -> None:
    """Measures both ways."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--packed", action="store_true", help="float8 with a scale for each block")
    args = parser.parse_args()
    dtype = args.dtype
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder / "small", 64, args.packed)
        convert_checkpoint(folder / "small", folder / "first", dtype=dtype)  # imports and caches
        export_checkpoint(folder / "first", folder / "first-back")
        write_model(folder / "source", WIDTH, args.packed)
        out, back = folder / "out", folder / "back"
        peaks = {
            "convert": watched(lambda: convert_checkpoint(folder / "source", out, dtype=dtype)),
            "export": watched(lambda: export_checkpoint(out, back)),
        }
        files = [open_checkpoint(file) for file in out.glob("*.safetensors")]
        sizes = [stored_of(file).info(name).nbytes for file in files for name in names_of(file)]
        for name, peak in peaks.items():
            line = {"model_bytes": sum(sizes), "largest_bytes": max(sizes), "peak_bytes": peak}
            sys.stdout.write(json.dumps({"step": name, "dtype": dtype, **line}) + "\n")


if __name__ == "__main__":
    main()
