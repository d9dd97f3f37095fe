"""Engine directories whose parts do not hold here: left out or refused, with one line.

Other GPUs, drivers and versions are fakes: the facts of the machine are replaced.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run
from engine_directories import flip, make, rewrite, tokens_of
from llmfw import cache
from llmfw.engine.build_engine import build_engine
from llmfw.errors import CheckpointError, ConfigError
from llmfw.models import engine_dir, machine
from llmfw.models.convert import convert_checkpoint
from llmfw.models.machine import MachineFacts
from llmfw.models.manifest import read_manifest
from llmfw.weights import open_checkpoint

H100 = MachineFacts(
    "cuda", "NVIDIA H100 80GB HBM3", "9.0", 85 << 30, "", "570.124", "12.8", "2.8", "13.4"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an engine."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def engine(made: Path, tmp_path: Path) -> Path:
    """A copy of the engine that a test may change; the checkpoint is copied too."""
    shutil.copytree(made / "engine", tmp_path / "engine")
    return tmp_path / "engine"


@pytest.fixture(autouse=True)
def ready_made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The table of ready-made files, emptied for each test."""
    table: dict[str, Path] = {}
    monkeypatch.setattr(cache, "_ready_made", table)
    return table


def test_everything_holds_on_the_machine_that_built_it(
    made: Path, ready_made: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    tokens_of(made / "engine")
    assert {"kernels/norm-abc.cubin", "kernels/tune-GPU-abc.json"} <= set(ready_made)
    assert caplog.text == ""


def other(**changes: str) -> Callable[[Any], MachineFacts]:
    """This machine with other facts."""
    real = machine.machine_facts
    return lambda device: replace(real(device), **changes)


STALE = {
    "gpu": (lambda device: H100, "NVIDIA H100 80GB HBM3 (9.0)", set()),
    "cpu": (other(flags="0"), "this CPU has other features", set()),
    "driver": (other(driver="999.1"), "driver none, 999.1 is here", {"kernels/norm-abc.cubin"}),
    "torch": (other(torch="9.9"), "9.9 is here", set()),
    "cuda": (other(cuda="99.0"), "built with cuda none, 99.0 is here", set()),
    "cupy": (other(cupy="99.0"), "built with cupy none, 99.0 is here", set()),
}


@pytest.mark.parametrize("case", STALE)
def test_what_another_machine_makes_useless_is_left_out_with_one_line(
    case: str,
    made: Path,
    ready_made: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts, reason, kept = STALE[case]
    monkeypatch.setattr(machine, "machine_facts", facts)
    assert tokens_of(made / "engine") == tokens_of(made / "checkpoint")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.message
    assert "tuning results and the memory plan are not used" in record.message
    assert {name for name in ready_made if name.startswith("kernels/")} == kept


EVERYTHING = {"compiled kernels", "tuning results", "the memory plan"}


@pytest.mark.parametrize(
    ("changes", "reason", "parts"),
    [
        ({}, "", set()),
        ({"memory": 1}, "", set()),
        ({"name": "NVIDIA L40S", "capability": "8.9"}, "this is NVIDIA L40S (8.9)", EVERYTHING),
        ({"capability": "9.1"}, "this is NVIDIA H100 80GB HBM3 (9.1)", EVERYTHING),
        ({"driver": "580.1"}, "driver 570.124, 580.1 is here", EVERYTHING - {"compiled kernels"}),
        ({"torch": "2.9"}, "torch 2.8, 2.9 is here", EVERYTHING),
        ({"cuda": "13.0"}, "cuda 12.8, 13.0 is here", EVERYTHING),
        ({"cupy": ""}, "cupy 13.4, none is here", EVERYTHING),
    ],
)
def test_what_a_change_on_a_gpu_makes_useless(
    changes: dict[str, Any], reason: str, parts: set[str], made: Path
) -> None:
    manifest = replace(read_manifest(made / "engine"), machine=H100)
    found = list(engine_dir.differences(manifest, replace(H100, **changes), manifest.plugin))
    assert {part for each in found for part in each.parts} == parts
    assert [reason in each.reason for each in found] == [True] * bool(parts)


def test_a_cpu_is_known_by_what_it_can_do(made: Path) -> None:
    manifest = read_manifest(made / "engine")
    renamed = replace(manifest.machine, name="Another CPU")
    assert list(engine_dir.differences(manifest, renamed, manifest.plugin)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"core_version": "0.0.1"}, "built with llmfw-core 0.0.1"),
        (
            {"plugin": {"distribution": "llmfw-llama", "version": "0.0.1"}},
            "built with llmfw-llama 0.0.1",
        ),
    ],
    ids=["core", "plugin"],
)
def test_another_version_leaves_out_what_it_may_have_changed(
    changes: dict[str, Any],
    reason: str,
    engine: Path,
    ready_made: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewrite(engine, **changes)
    tokens_of(engine)
    assert [reason in record.message for record in caplog.records] == [True]
    assert "kernels/norm-abc.cubin" not in ready_made


@pytest.mark.parametrize("name", ["kernels/norm-abc.cubin", "kernels/tune-GPU-abc.json"])
@pytest.mark.parametrize("damage", ["flipped", "lost"])
def test_a_damaged_file_of_kernels_is_left_out(
    name: str,
    damage: str,
    engine: Path,
    ready_made: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = engine / "cache" / name
    flip(file) if damage == "flipped" else file.unlink()
    tokens_of(engine)
    (record,) = caplog.records
    assert record.message == f"{engine}: not as built, so left out: cache/{name}"
    assert name not in ready_made
    assert len([each for each in ready_made if each.startswith("kernels/")]) == 1


@pytest.mark.parametrize("name", ["config.json", "hf/config.json", "checksums.json", "source.json"])
def test_a_damaged_checkpoint_is_refused(name: str, engine: Path) -> None:
    flip(engine / "checkpoint" / name)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        tokens_of(engine)
    assert "again" in str(caught.value.hint)
    done = run("run", "--model", str(engine), "hello")
    assert done.exit_code in (CheckpointError.exit_code, ConfigError.exit_code)
    assert done.stderr.startswith("error: ")


def test_a_flipped_byte_of_weights_is_refused_by_the_tensors_name(engine: Path) -> None:
    file = engine / "checkpoint" / "rank0.safetensors"
    info = open_checkpoint(engine / "checkpoint").info("model.norm.weight")
    flip(file, info.offset + 3)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' is not what was"):
        tokens_of(engine)


def test_a_flipped_byte_of_the_manifest_is_refused_wherever_it_is(
    made: Path, tmp_path: Path
) -> None:
    text = (made / "engine" / "manifest.json").read_bytes()
    for place in range(0, len(text) - 2, 61):
        (tmp_path / "manifest.json").write_bytes(text)
        flip(tmp_path / "manifest.json", place)
        with pytest.raises(ConfigError, match=r"manifest\.json") as caught:
            read_manifest(tmp_path)
        assert "build the engine again" in str(caught.value.hint)


def test_a_manifest_of_a_later_format_is_refused(engine: Path) -> None:
    raw = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").write_text(json.dumps({**raw, "format_version": 2}))
    with pytest.raises(ConfigError, match="is 'llmfw-engine' 2, not 'llmfw-engine' 1"):
        tokens_of(engine)


def test_files_outside_of_the_engine_are_refused(engine: Path) -> None:
    manifest = read_manifest(engine)
    rewrite_files = {**manifest.files, "cache/../../elsewhere.so": "0"}
    (engine / "manifest.json").write_text(replace(manifest, files=rewrite_files).to_json())
    with pytest.raises(ConfigError, match="lies outside of the directory"):
        read_manifest(engine)


def test_a_link_that_leads_nowhere_is_told(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "engine", tmp_path / "moved", symlinks=True)
    with pytest.raises(ConfigError, match="converted checkpoint of this engine is not there"):
        tokens_of(tmp_path / "moved")


def test_a_checkpoint_that_was_made_anew_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    build_engine(tmp_path / "checkpoint", tmp_path / "engine", kernels="reference")
    shutil.rmtree(tmp_path / "checkpoint")
    convert_checkpoint(made / "source", tmp_path / "checkpoint", dtype="float32")
    with pytest.raises(CheckpointError, match="is not the file that the engine was built from"):
        tokens_of(tmp_path / "engine")


def test_a_memory_plan_that_the_gpu_has_no_room_for_is_not_used(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    manifest = read_manifest(made / "engine")
    monkeypatch.setattr(machine, "machine_facts", lambda device: manifest.machine)
    device = torch.device("cuda", 0)
    for free, planned in ((1 << 40, manifest.memory.kv_cache), (1 << 10, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 41))
        opened = engine_dir.open_engine(made / "engine", manifest, device, manifest.plugin)
        assert opened.defaults.kv_cache_memory == planned
    assert "the memory plan is not used" in caplog.text
