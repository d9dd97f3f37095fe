"""The facts of a machine: a CPU's from Linux, a GPU's from torch and the driver's own line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfw.models import machine
from llmfw.ops.device import cpu_features, cpu_flags

LINE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build"


def test_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : A CPU @ 3 GHz\nflags : a b\n")
    monkeypatch.setattr(machine, "CPUINFO", info)
    facts = machine.machine_facts(torch.device("cpu"))
    assert (facts.device, facts.name) == ("cpu", "A CPU @ 3 GHz")
    assert facts.capability == " ".join(sorted(cpu_features(cpu_flags())))
    assert (facts.driver, facts.cuda, facts.memory) == ("", "", 0)
    assert facts.torch == torch.__version__
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.machine_facts(torch.device("cpu")).name == ""


def test_other_flags_are_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.machine_facts(torch.device("cpu")).flags
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"other"}))
    assert machine.machine_facts(torch.device("cpu")).flags != before


def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=5 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    driver = tmp_path / "version"
    driver.write_text(f"{LINE}\nGCC version: 12\n")
    monkeypatch.setattr(machine, "DRIVER", driver)
    facts = machine.machine_facts(torch.device("cuda", 0))
    assert (facts.device, facts.name, facts.capability) == ("cuda", "NVIDIA X", "9.0")
    assert (facts.memory, facts.driver) == (5 << 30, "570.124.06")
    driver.unlink()
    assert machine.machine_facts(torch.device("cuda", 0)).driver == ""
