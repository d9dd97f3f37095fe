"""Engine directories: a start without a compiler, and what becomes of parts that do not hold here.

Other GPUs, drivers and versions are fakes: the facts of the machine are replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run
from llmfw import LLM, SamplingParams, cache
from llmfw.engine.build_engine import build_engine
from llmfw.errors import CheckpointError, ConfigError, UsageError
from llmfw.kernels.cpu import library
from llmfw.models import engine_dir, machine
from llmfw.models.convert import convert_checkpoint
from llmfw.models.machine import MachineFacts
from llmfw.models.manifest import read_manifest
from llmfw.ops.device import cpu_features, cpu_flags, find_compiler
from llmfw.weights import open_checkpoint, resolve_model
from published_layouts import tensors_of, write

ARCHITECTURE = "LlamaForCausalLM"
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [3, 1, 4, 1, 5]
native = pytest.mark.skipif(
    find_compiler() is None or "avx2" not in cpu_features(cpu_flags()),
    reason="no compiler, or a CPU that the pack does not serve",
)
H100 = MachineFacts(
    "cuda", "NVIDIA H100 80GB HBM3", "9.0", 85 << 30, "", "570.124", "12.8", "2.8", "13.4"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an engine with one compiled kernel file, one of timings, one configuration.

    The files of kernels are fakes: their names alone say what they are.
    """
    folder = tmp_path_factory.mktemp("made")
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


def tokens_of(model: Path, **settings: Any) -> list[int]:
    settings = {"kernels": "reference", "skip_tokenizer_init": True, **settings}
    with LLM(str(model), **settings) as llm:
        return list(llm.generate(PROMPT, GREEDY).outputs[0].token_ids)


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
    "capability": (other(capability="9.0"), "this is", set()),
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
    assert told["graph_batch_sizes"] == [1, 2]
    assert {"cupy.rms_norm"} <= {each["kernel"] for each in told["kernels"]}
    done = run("build", source, "--dry-run", "--gpu", "t4", "--kv-cache-memory", "1")
    assert done.exit_code == 0, done.stderr
    assert "NVIDIA T4" in done.stdout
    assert "paged_attention" in done.stdout
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
