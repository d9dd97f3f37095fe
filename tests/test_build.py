"""Building: what an engine directory holds, a start without a compiler, and a run without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run
from engine_directories import ARCHITECTURE, flip, make, tokens_of
from llmfw import LLM, cache
from llmfw.engine.build_engine import build_engine
from llmfw.errors import CheckpointError, UsageError
from llmfw.kernels.cpu import library
from llmfw.models.convert import convert_checkpoint
from llmfw.models.manifest import read_manifest
from llmfw.ops.device import cpu_features, cpu_flags, find_compiler
from llmfw.weights import resolve_model

native = pytest.mark.skipif(
    find_compiler() is None or "avx2" not in cpu_features(cpu_flags()),
    reason="no compiler, or a CPU that the pack does not serve",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an engine."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def ready_made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The table of ready-made files, emptied for each test."""
    table: dict[str, Path] = {}
    monkeypatch.setattr(cache, "_ready_made", table)
    return table


def test_run_takes_all_three_alike(made: Path) -> None:
    source, checkpoint, engine = (
        tokens_of(made / name) for name in ("source", "checkpoint", "engine")
    )
    assert source == checkpoint == engine
    kinds = [resolve_model(made / name).kind for name in ("source", "checkpoint", "engine")]
    assert kinds == ["directory", "checkpoint", "engine"]


def test_what_an_engine_holds(made: Path) -> None:
    manifest = read_manifest(made / "engine")
    assert manifest.architecture == ARCHITECTURE
    assert manifest.plugin.distribution == "llmfw-llama"
    assert manifest.linked
    assert (made / "engine" / "checkpoint").resolve() == (made / "checkpoint").resolve()
    assert manifest.defaults.max_num_seqs == 3
    assert manifest.memory.max_num_seqs == 3
    assert manifest.memory.num_blocks * manifest.memory.block_size >= 3 * 64
    assert manifest.graphs.count == 0
    groups = {name.split("/")[0] for name in manifest.files}
    assert groups == {"cache", "checkpoint"}
    assert not any(name.endswith(".safetensors") for name in manifest.files)


def test_its_settings_are_those_of_the_build_unless_told_otherwise(made: Path) -> None:
    def facts(**settings: Any) -> Any:
        options = {"kernels": "reference", "skip_tokenizer_init": True, **settings}
        with LLM(str(made / "engine"), **options) as llm:
            settled = llm._engine.settings
            return settled.max_num_seqs, settled.kv_cache_memory

    plan = read_manifest(made / "engine").memory
    assert facts() == (3, plan.kv_cache)
    assert facts(max_num_seqs=5) == (5, None)
    assert facts(kv_cache_memory="1MiB") == (3, "1MiB")


def test_a_model_is_converted_on_the_way_and_a_checkpoint_may_be_copied(
    made: Path, tmp_path: Path
) -> None:
    done = run(
        *("build", str(made / "source"), str(tmp_path / "one"), "--kernels", "reference"), "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["linked"] is False
    assert "files of kernels and timings" in done.stderr
    checkpoint = str(made / "checkpoint")
    done = run("build", checkpoint, str(tmp_path / "two"), "--copy", "--kernels", "reference")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert not (tmp_path / "two" / "checkpoint").is_symlink()
    assert tokens_of(tmp_path / "one") == tokens_of(tmp_path / "two") == tokens_of(made / "source")
    with pytest.raises(UsageError, match="is an engine already"):
        build_engine(tmp_path / "one", tmp_path / "three")
    with pytest.raises(CheckpointError, match="is there already"):
        build_engine(checkpoint, tmp_path / "two")
    with pytest.raises(UsageError, match="is an engine already"):
        convert_checkpoint(made / "engine", tmp_path / "again")


@pytest.fixture(scope="module")
def compiled(made: Path) -> Iterator[Path]:
    """An engine with the CPU pack's own object, built in a process of its own."""
    command = [*(sys.executable, "-m", "llmfw_cli", "build", str(made / "checkpoint"))]
    done = subprocess.run(
        [*command, str(made / "compiled")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    yield made / "compiled"
    library.forget()


@native
def test_a_start_needs_no_compiler(compiled: Path, tmp_path: Path) -> None:
    """In a new process with an empty cache and no compiler, the kernels are the engine's."""
    code = (
        "from llmfw import LLM\n"
        f"llm = LLM({str(compiled)!r}, skip_tokenizer_init=True)\n"
        "names = {c.chosen for c in llm.loaded.model_config.ops.choices.values()}\n"
        "assert 'cpu.linear' in names, names\n"
        "llm.shutdown()\n"
    )
    environment = {**os.environ, "CXX": "/nowhere", "LLMFW_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (tmp_path / "cache").exists()


@native
def test_a_damaged_object_is_never_loaded(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready_made: dict[str, Path]
) -> None:
    shutil.copytree(compiled, tmp_path / "engine")
    (file,) = (tmp_path / "engine" / "cache" / "kernels" / "cpu").iterdir()
    flip(file, 5000)
    loaded: list[Path] = []
    real = library.load_object_file
    monkeypatch.setattr(library, "load_object_file", lambda path: loaded.append(path) or real(path))
    library.forget()
    tokens_of(tmp_path / "engine", kernels="auto")
    assert file not in loaded
    assert not any(name.startswith("kernels/") for name in ready_made)


def test_a_dry_run_explains_a_gpu_that_is_not_there(made: Path, tmp_path: Path) -> None:
    source = str(made / "source")
    done = run("build", source, "--dry-run", "--gpu", "H100", "--max-num-seqs", "2", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["gpu_name"].startswith("NVIDIA H100")
    assert told["weights_bytes"] == read_manifest(made / "engine").memory.weights
    assert (told["fits"], told["full_length_sequences"]) == (True, 2.0)
    assert told["graph_batch_sizes"] == []
    assert told["no_graphs"] == "paged_attention runs by its reference"
    assert {"cupy.rms_norm"} <= {each["kernel"] for each in told["kernels"]}
    done = run("build", source, "--dry-run", "--gpu", "t4", "--kv-cache-memory", "1")
    assert done.exit_code == 0, done.stderr
    assert "NVIDIA T4" in done.stdout
    assert "paged_attention" in done.stdout
    assert "cupy.rms_norm: needs sm_80" in done.stdout
    assert "no CUDA graphs: " in done.stderr
    assert "it does not fit" in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--dry-run",), "--dry-run needs a GPU"),
        (("--dry-run", "--gpu", "h101"), "'h101' is not in the table"),
        (("--gpu", "h100"), "--gpu goes with --dry-run"),
        ((), "ENGINE is missing"),
    ],
)
def test_options_that_do_not_go_together(made: Path, options: tuple[str, ...], told: str) -> None:
    done = run("build", str(made / "source"), *options)
    assert done.exit_code == UsageError.exit_code
    assert told in done.stderr
