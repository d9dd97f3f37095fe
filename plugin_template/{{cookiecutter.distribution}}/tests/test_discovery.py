"""The plugin is found by its metadata, imports without torch, and generates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llmfw import LLM, SamplingParams
from llmfw.plugins import Catalog

from {{ cookiecutter.import_name }} import TINY

ARCHITECTURE = "{{ cookiecutter.architecture }}"
DISTRIBUTION = "{{ cookiecutter.distribution }}"


def test_the_entry_point_is_found() -> None:
    assert Catalog.scan().find(ARCHITECTURE, prefer=DISTRIBUTION).dist == DISTRIBUTION


def test_the_package_imports_without_torch() -> None:
    code = "import sys, {{ cookiecutter.import_name }}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tiny_random_model_generates(tmp_path: Path) -> None:
    config = {**TINY, "architectures": [ARCHITECTURE]}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with LLM(
        tmp_path, plugin=DISTRIBUTION, device="cpu", load_format="dummy", skip_tokenizer_init=True
    ) as llm:
        answer = llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4
