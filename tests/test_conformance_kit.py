"""The kit around the checks: pytest's option, light imports, metadata, tiny configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contract_plugins import KINDS, planted
from llmfw import hookimpl
from llmfw.errors import ConfigError, UsageError
from llmfw.plugins import register_local, unregister_local
from llmfw.testing import CheckFailure, CheckSkipped, ModelContract, Subject
from llmfw.testing.checks import (
    CHECKS,
    config_round_trip,
    discovered_by_metadata,
    imports_without_torch,
    matches_reference,
    preempted_undisturbed,
    run_checks,
    wheel_builds_and_installs,
)
from llmfw.testing.selection import subjects_of
from llmfw.testing.tiny import shrink, shrunk_config

SCALED = KINDS["scaled"]


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_pytest_runs_the_contract_of_an_installed_plugin(tmp_path: Path) -> None:
    only = "discovered or accounts or matches_reference"
    done = pytest_in(tmp_path, "--llmfw-plugin", "llmfw-llama", "-k", only, "-rA")
    assert done.returncode == 0, done.stdout + done.stderr
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        assert f"Test{architecture}::test_matches_reference" in done.stdout


def test_pytest_names_what_is_installed(tmp_path: Path) -> None:
    done = pytest_in(tmp_path, "--llmfw-plugin", "LlamaForCausalML")
    assert done.returncode != 0
    assert "did you mean 'LlamaForCausalLM'" in done.stdout


def test_every_check_is_a_test_of_the_contract() -> None:
    tests = {name.removeprefix("test_") for name in vars(ModelContract) if name.startswith("test_")}
    assert tests == {check.name for check in CHECKS}
    for check in CHECKS:
        marks = getattr(getattr(ModelContract, f"test_{check.name}"), "pytestmark", [])
        assert {mark.name for mark in marks} == {
            name for name, wanted in (("slow", check.slow), ("gpu", check.gpu)) if wanted
        }


def test_a_pytest_run_without_contracts_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n"
        "def test_nothing():\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert 'llmfw.testing.plugin' in sys.modules\n"
        "    assert not heavy, heavy\n",
        "utf-8",
    )
    done = pytest_in(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a module as a distribution with an entry point, and give its subject."""

    def install(source: str, entry: str = "FakeForCausalLM = fake_plugin:plugin") -> Subject:
        (tmp_path / "fake_plugin.py").write_text(source, "utf-8")
        info = tmp_path / "fake_plugin-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llmfw.models]\n{entry}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Subject("FakeForCausalLM", {}, distribution="fake-plugin")

    yield install
    sys.modules.pop("fake_plugin", None)


LIGHT = "class Plugin: pass\nplugin = Plugin()\n"


def test_a_light_plugin_is_found_and_imported(installed) -> None:
    subject = installed(LIGHT)
    discovered_by_metadata(subject)
    imports_without_torch(subject)
    with pytest.raises(CheckSkipped, match="was not installed from a source folder"):
        wheel_builds_and_installs(subject)


def test_an_import_of_torch_is_named(installed) -> None:
    with pytest.raises(CheckFailure) as caught:
        imports_without_torch(installed(f"import torch\n{LIGHT}"))
    text = str(caught.value)
    assert "torch is not to be imported here" in text
    assert "fake_plugin.py" in text
    assert "line 1" in text
    assert "inside the hooks" in text


def test_an_entry_point_under_another_name_is_told(installed) -> None:
    subject = installed(LIGHT, entry="OtherForCausalLM = fake_plugin:plugin")
    with pytest.raises(CheckFailure, match="not found by its metadata") as caught:
        discovered_by_metadata(subject)
    assert "pyproject.toml" in str(caught.value)


class ForgetfulConfig:
    """Writes its width doubled."""

    def __init__(self, **fields) -> None:
        self.__dict__.update(fields)

    def to_dict(self) -> dict:
        return {**vars(self), "hidden_size": 2 * self.hidden_size}


def test_a_config_that_changes_is_named() -> None:
    class Plugin:
        @hookimpl
        def llmfw_config(self, raw):
            return ForgetfulConfig(**raw)

    with planted(SCALED, Plugin()), Subject(SCALED.architecture, SCALED.config) as subject:
        with pytest.raises(CheckFailure, match="changes when it is written") as caught:
            config_round_trip(subject)
    assert "hidden_size" in str(caught.value)
    assert "ForgetfulConfig" in str(caught.value)


def test_a_reference_of_the_author_serves_in_place_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    made = []

    def reference(config):
        made.append(config)
        return AutoModelForCausalLM.from_config(config)

    with planted(SCALED, SCALED.plugin):
        with Subject(SCALED.architecture, SCALED.config, reference=reference) as subject:
            matches_reference(subject)
    assert made


def test_without_any_reference_the_contract_says_how_to_name_one() -> None:
    raw = {"model_type": "nobody-knows", "hidden_size": 8}
    with planted(SCALED, SCALED.plugin), Subject(SCALED.architecture, raw) as subject:
        results = list(run_checks(subject, [c for c in CHECKS if c.name == "matches_reference"]))
    assert results[0].outcome == "failed"


def test_a_plugin_can_declare_its_tiny_configuration() -> None:
    class Declares:
        tiny_configs = {"DeclaringForCausalLM": {**SCALED.config, "vocab_size": 77}}

    register_local("DeclaringForCausalLM", Declares(), "a test")
    try:
        with Subject("DeclaringForCausalLM") as subject:
            assert subject.vocab_size == 77
    finally:
        unregister_local("DeclaringForCausalLM")


def test_defaults_are_shrunk() -> None:
    raw = shrunk_config("OPTForCausalLM")
    assert raw["model_type"] == "opt"
    assert raw["hidden_size"] == 64
    assert raw["ffn_dim"] == 96
    with pytest.raises(ConfigError, match="no causal model called"):
        shrunk_config("NobodyKnowsForCausalLM")


def test_the_family_of_that_name_is_taken_where_several_share_a_model() -> None:
    assert shrunk_config("LlamaForCausalLM")["model_type"] == "llama"
    assert shrunk_config("GPT2LMHeadModel")["model_type"] == "gpt2"


def test_a_configuration_that_is_not_tiny_is_refused() -> None:
    large = {**SCALED.config, "hidden_size": 4096, "num_hidden_layers": 8}
    with planted(SCALED, SCALED.plugin), Subject(SCALED.architecture, large) as subject:
        with pytest.raises(ConfigError, match="million parameters"):
            subject.checkpoint()


def test_a_real_configuration_is_shrunk_and_keeps_its_switches(tmp_path: Path) -> None:
    real = {
        "architectures": [SCALED.architecture],
        "model_type": "granite",
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 40,
        "vocab_size": 49152,
        "embedding_multiplier": 12,
        "torch_dtype": "bfloat16",
    }
    small = shrink(real)
    assert (small["hidden_size"], small["num_key_value_heads"]) == (64, 2)
    assert small["embedding_multiplier"] == 12
    assert "torch_dtype" not in small
    (tmp_path / "config.json").write_text(json.dumps(real), "utf-8")
    with planted(SCALED, SCALED.plugin):
        (subject,) = subjects_of(str(tmp_path))
        with subject:
            matches_reference(subject)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'LlamaForCausalLM'"):
        subjects_of("LlamaForCausalML")


@pytest.mark.parametrize("positions", [36, 60, 63, 72])
def test_requests_are_preempted_whatever_the_longest_prompt(positions: int) -> None:
    raw = shrunk_config("LlamaForCausalLM") | {"max_position_embeddings": positions}
    with Subject("LlamaForCausalLM", raw) as subject:
        preempted_undisturbed(subject)  # raises CheckSkipped where nothing is preempted
