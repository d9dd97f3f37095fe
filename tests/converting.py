"""What tests of converted checkpoints share: a source, its files, and what it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmfw.models import load_model
from llmfw.testing import PackedSession
from published_layouts import tensors_of, write

LLAMA = "LlamaForCausalLM"


def written(architecture: str, folder: Path) -> Path:
    """A published layout with files that are no weights beside it."""
    write(architecture, folder, tensors_of(architecture))
    (folder / "tokenizer.json").write_text('{"a": "b"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def logits_of(model: Path, **settings: Any) -> torch.Tensor:
    loaded = load_model(model, kernels="reference", block_size=4, **settings)
    return PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"]


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
