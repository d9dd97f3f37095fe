"""What a user installs: the wheels, in a fresh environment, outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, StableLmConfig

from tiny_tokenizer import tiny_backend

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path.parent for path in ROOT.glob("builtin_models/*/pyproject.toml"))
PACKAGES = [ROOT / "core", ROOT / "cli", *FAMILIES]
UNKNOWN_ARCHITECTURE = 6  # llmfw.errors

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheels, which borrows all other packages from this one."""

    folder: Path

    def llmfw(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the installed command, away from the checkout."""
        return run([self.folder / "bin" / "llmfw", *arguments], cwd=self.folder)

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's pip on the other one."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python")]
        return run([*pip, *arguments], cwd=self.folder)


def run(command: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with neither a terminal nor the checkout in its environment."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels, built from copies, so that nothing of an earlier build gets into them."""
    folder = tmp_path_factory.mktemp("wheels")
    left = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    for package in PACKAGES:
        copy = shutil.copytree(package, folder / "sources" / package.name, ignore=left)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
        done = run([*build, "--outdir", folder, copy], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with the wheels in it."""
    environment = Environment(tmp_path_factory.mktemp("outside") / "venv")
    done = run([sys.executable, "-m", "venv", "--without-pip", environment.folder], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    borrow_packages(environment.folder)
    done = environment.pip("install", "--no-deps", "--no-index", *map(str, wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    return environment


def borrow_packages(venv: Path) -> None:
    """Let `venv` import everything installed here but llmfw's own packages."""
    (site,) = venv.glob("lib/python*/site-packages")
    borrowed = venv / "borrowed"
    borrowed.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("llmfw", "__editable__")):
            (borrowed / path.name).symlink_to(path)
    (site / "borrowed.pth").write_text(f"{borrowed}\n", "utf-8")


def test_wheels_hold_what_they_need(wheels: list[Path]) -> None:
    names = {wheel.name.split("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in wheels}
    assert set(names) >= {"llmfw_core", "llmfw_cli", "llmfw_llama"}
    assert len(names) == len(PACKAGES)
    for files in names.values():
        assert any(name.endswith("/py.typed") for name in files)
        assert any(name.endswith("/licenses/LICENSE") for name in files)
        own = [name for name in files if "/template/" not in name]  # what llmfw new renders
        assert not any("tests/" in name for name in own)
    core = ROOT / "core" / "src"
    sources = {
        path.relative_to(core).as_posix()
        for ending in ("py", "cu", "cuh", "cpp", "h")
        for path in core.glob(f"llmfw/**/*.{ending}")
    }
    assert sources <= set(names["llmfw_core"])


def test_the_installed_command_answers_and_knows_when_its_plugin_is_gone(
    installed: Environment,
) -> None:
    """One story, since each step needs the one before it."""
    question = ("--prompt", "The capital of France is", "--max-tokens", "4", "--temperature", "0")
    answer = installed.llmfw("run", "--model", "smollm2", *question, "--json")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert "Paris" in result["text"]
    assert len(result["token_ids"]) == 4
    assert str(ROOT) not in answer.stderr

    model = installed.folder / "model"
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    done = installed.pip("uninstall", "--yes", "llmfw-llama")
    assert done.returncode == 0, done.stderr
    refusal = installed.llmfw("run", "--model", str(model), *question, "--no-fallback")
    assert refusal.returncode == UNKNOWN_ARCHITECTURE, refusal.stderr
    assert "LlamaForCausalLM" in refusal.stderr
    assert "Traceback" not in refusal.stderr
    assert refusal.stdout == ""


def test_a_plugin_of_ones_own_installs_answers_and_goes(
    installed: Environment, tmp_path: Path
) -> None:
    """`llmfw new --from`, pip install of the directory, run, uninstall, all from wheels."""
    checkpoint = tmp_path / "tiny-stablelm"
    config = StableLmConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint)
    tiny_backend().save(str(checkpoint / "tokenizer.json"))
    question = ("--model", str(checkpoint), "--prompt", "ab", "--max-tokens", "4", "--json")

    written = run(
        [installed.folder / "bin" / "llmfw", "new", "--from", checkpoint, "--no-trial"], tmp_path
    )
    assert written.returncode == 0, written.stderr
    (plugin,) = (path.parent for path in tmp_path.glob("*/pyproject.toml"))
    done = installed.pip("install", "--no-deps", "--no-index", "--no-build-isolation", str(plugin))
    assert done.returncode == 0, done.stdout + done.stderr
    answer = installed.llmfw("run", *question)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["plugin"].startswith(plugin.name)

    assert installed.pip("uninstall", "--yes", plugin.name).returncode == 0
    fallback = installed.llmfw("run", *question)
    assert fallback.returncode == 0, fallback.stderr
    assert json.loads(fallback.stdout)["plugin"].startswith("llmfw-transformers")
    assert "is served by the fallback" in fallback.stderr
    refusal = installed.llmfw("run", *question, "--no-fallback")
    assert refusal.returncode == UNKNOWN_ARCHITECTURE, refusal.stderr
    assert "StableLmForCausalLM" in refusal.stderr
