"""The command line starts fast, and imports nothing heavy before a command needs it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import run
from plugin_fakes import model_dist

HEAVY = ["torch", "transformers", "numpy", "llmfw_llama", "tokenizers", "safetensors", "gguf"]
LIGHT = [
    ["--help"],
    ["run", "--help"],
    ["bench", "latency", "--help"],
    ["plugins", "list"],
    ["plugins", "info", "llmfw-core"],
    ["--version"],
]
CODE = """
import sys
from llmfw_cli.app import main
sys.argv[0] = "llmfw"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = HEAVY & set(sys.modules)
assert not found, found
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    model_dist(tmp_path, "llmfw-trap", "TrapForCausalLM", code="raise SystemExit('imported')\n")
    code = f"HEAVY = { ({*HEAVY, 'llmfw_trap'})!r}\n{CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    def seconds(*arguments: str) -> float:
        """Processor time, which a busy machine does not stretch as it does the clock's."""
        best = float("inf")
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            best = min(best, used)
        return best

    assert seconds("-m", "llmfw_cli", "--help") - seconds("-c", "pass") < 0.6


def test_help_names_every_command_and_its_panels() -> None:
    wide = {"COLUMNS": "120"}
    told = run("--help", env=wide).stdout
    for command in ("run", "chat", "inspect", "plugins", "kernels", "bench", "env"):
        assert f" {command} " in told
    panels = run("run", "--help", env=wide).stdout
    for panel in ("Model", "Prompt", "Sampling", "Engine", "Output"):
        assert f" {panel} " in panels


@pytest.mark.parametrize("arguments", [[], ["plugins"], ["bench"], ["kernels"]], ids=" ".join)
def test_a_group_alone_prints_its_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage: llmfw" in done.stdout.replace("root", "llmfw")


def test_completion_needs_metadata_only() -> None:
    from llmfw_cli.completions import complete_distribution, complete_extension, complete_model

    assert "llmfw-core" in complete_distribution("llmfw-")
    assert complete_distribution("nothing") == []
    assert complete_extension("") == []
    assert isinstance(complete_model(""), list)


def test_shell_completion_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmfw_cli"],
        env={
            **os.environ,
            "_LLMFW_COMPLETE": "complete_bash",
            "COMP_WORDS": "llmfw plug",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "plugins" in done.stdout
