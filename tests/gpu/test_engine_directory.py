"""Engine directories on a GPU: a start that compiles and measures nothing, and the same tokens.

What it saves is measured by tests/measure_cold_start.py with --device cuda.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from llmfw.models.convert import convert_checkpoint
from llmfw.models.machine import machine_facts
from llmfw.models.manifest import read_manifest
from parity import tiny_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
START = """
import json, sys
from llmfw import LLM, SamplingParams
with LLM(sys.argv[1], device="cuda", skip_tokenizer_init=True, **json.loads(sys.argv[2])) as llm:
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3], list(range(90))], params)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=None,
    bos_token_id=None,
)
LIMITS = {"max_num_seqs": 4, "kv_cache_memory": "64MiB"}


def start(model: Path, cache: Path, **settings: Any) -> tuple[list[list[int]], str]:
    """Tokens and standard error of a start in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(model), json.dumps(settings)],
        env={**os.environ, "LLMFW_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, its checkpoint, and an engine built in a process of its own."""
    folder = tmp_path_factory.mktemp("engine")
    hf = tiny_hf(CONFIG, "LlamaForCausalLM").to(torch.bfloat16)
    hf.save_pretrained(folder / "model")
    convert_checkpoint(folder / "model", folder / "checkpoint")
    limits = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    command = [sys.executable, "-m", "llmfw_cli", "build", "--device", "cuda", *limits]
    done = subprocess.run(
        [*command, str(folder / "checkpoint"), str(folder / "engine")],
        env={**os.environ, "LLMFW_CACHE": str(folder / "built")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_start_compiles_and_measures_nothing(made: Path, tmp_path: Path):
    expected, _ = start(made / "model", tmp_path / "full", **LIMITS)
    tokens, told = start(made / "engine", tmp_path / "empty")
    assert tokens == expected
    assert told == ""
    assert not list((tmp_path / "empty").rglob("*.cubin"))
    assert not list((tmp_path / "empty").rglob("tune-*.json"))


def test_the_manifest_tells_of_this_gpu(made: Path):
    manifest = read_manifest(made / "engine")
    assert manifest.machine == machine_facts(torch.device("cuda", 0))
    assert manifest.machine.driver
    assert manifest.graphs.count > 0
    kinds = {Path(name).suffix for name in manifest.files if name.startswith("cache/kernels/")}
    assert {".cubin", ".json"} <= kinds


def test_a_lost_kernel_is_compiled_again_with_one_line(made: Path, tmp_path: Path):
    shutil.copytree(made / "engine", tmp_path / "engine")
    lost = next((tmp_path / "engine" / "cache" / "kernels").glob("*.cubin"))
    lost.write_bytes(b"not machine code")
    expected, _ = start(made / "engine", tmp_path / "one")
    tokens, told = start(tmp_path / "engine", tmp_path / "two")
    assert tokens == expected
    assert told.count("not as built, so left out") == 1
    assert (tmp_path / "two" / "kernels" / lost.name).is_file()
