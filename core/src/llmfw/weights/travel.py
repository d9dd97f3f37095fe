"""The files of a model that are no weights, and travel with it from one format to another."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

_WEIGHTS = (
    ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx",
    ".ot", ".npz", ".tflite", ".index.json",
)  # fmt: skip
_FOLDERS = ("additional_chat_templates",)


def carry_over(source: Path, target: Path, weights: Collection[str] = ()) -> tuple[str, ...]:
    """Copies configuration, tokenizer, templates, licence and the like, byte for byte.

    Args:
        source: A model's directory.
        target: Made where it is not there.
        weights: Names of files of weights that are taken care of.

    Returns:
        What was left behind beside weights: other folders and weights of other formats.

    Raises:
        OSError: If a file cannot be copied.
    """
    target.mkdir(parents=True, exist_ok=True)
    left: list[str] = []
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_dir():
            left.append(f"{path.name}/")
        elif not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)
        elif path.name not in weights:
            left.append(path.name)
    return tuple(left)
