"""What tests of engine directories share: how one is made, asked, damaged and written otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmfw import LLM, SamplingParams, cache
from llmfw.engine.build_engine import build_engine
from llmfw.models.convert import convert_checkpoint
from llmfw.models.manifest import read_manifest
from published_layouts import tensors_of, write

ARCHITECTURE = "LlamaForCausalLM"
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [3, 1, 4, 1, 5]


def make(folder: Path) -> Path:
    """A checkpoint and an engine with one compiled kernel file, one of timings, one configuration.

    The files of kernels are fakes: their names alone say what they are.
    """
    write(ARCHITECTURE, folder / "source", tensors_of(ARCHITECTURE))
    convert_checkpoint(folder / "source", folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMFW_CACHE", str(folder / "cache"))
        patch.setattr(cache, "_used", {})
        for name in ("kernels/norm-abc.cubin", "kernels/tune-GPU-abc.json"):
            file = folder / "cache" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
            cache.find(name)
        build_engine(folder / "checkpoint", folder / "engine", kernels="reference", max_num_seqs=3)
    return folder


def tokens_of(model: Path, **settings: Any) -> list[int]:
    settings = {"kernels": "reference", "skip_tokenizer_init": True, **settings}
    with LLM(str(model), **settings) as llm:
        return list(llm.generate(PROMPT, GREEDY).outputs[0].token_ids)


def rewrite(engine: Path, **changes: Any) -> None:
    """Another manifest, as another build would have written it."""
    manifest = read_manifest(engine)
    values = {
        name: type(getattr(manifest, name))(**value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    (engine / "manifest.json").write_text(replace(manifest, **values).to_json())


def flip(file: Path, place: int = -2) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
