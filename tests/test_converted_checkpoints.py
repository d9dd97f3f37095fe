"""A converted checkpoint that is damaged, of another version, written by others, or half made."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_helpers import run
from converting import LLAMA, changed_config, files_of, logits_of, written
from llmfw import DecoderModelForCausalLM
from llmfw.errors import CheckpointError, ConfigError, UsageError, WeightError
from llmfw.models import convert, load_model
from llmfw.models.convert import convert_checkpoint
from llmfw.models.export import export_checkpoint
from llmfw.plugins import unregister_local
from llmfw.weights import open_checkpoint, resolve_model
from llmfw.weights.staging import staging_path
from published_layouts import tensors_of, write


def test_a_flipped_byte_is_noticed_when_its_tensor_is_read(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    file = tmp_path / "converted" / "rank0.safetensors"
    info = open_checkpoint(tmp_path / "converted").info("model.layers.1.mlp.down_proj.weight")
    content = bytearray(file.read_bytes())
    content[info.offset + 11] ^= 4
    file.write_bytes(content)
    wanted = "tensor 'model.layers.1.mlp.down_proj.weight' is not what was written"
    for use in (load_model, lambda path: export_checkpoint(path, tmp_path / "back")):
        with pytest.raises(CheckpointError, match=wanted):
            use(tmp_path / "converted")
    assert not (tmp_path / "back").exists()


def test_two_architectures_in_one_checkpoint_are_refused(tmp_path: Path):
    convert_checkpoint(written(LLAMA, tmp_path / "source"), tmp_path / "converted")
    changed_config(tmp_path / "converted", architecture="LlamaForCausalLN")
    wanted = r"names the architecture 'LlamaForCausalLN', .*hf/config.json 'LlamaForCausalLM'"
    with pytest.raises(ConfigError, match=wanted):
        load_model(tmp_path / "converted")


def test_another_version_that_fills_alike_may_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    plugin = {"distribution": "llmfw-llama", "version": "0.0.1"}
    changed_config(tmp_path / "converted", plugin=plugin)
    with caplog.at_level(logging.INFO, "llmfw.models"):
        assert torch.equal(logits_of(tmp_path / "converted"), logits_of(source))
    assert "was made with llmfw-llama 0.0.1" in caplog.text
    assert "and fill alike" in caplog.text


def test_a_version_that_wants_its_weights_otherwise_is_refused(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    plugin = {"distribution": "llmfw-llama", "version": "0.0.1"}
    changed_config(tmp_path / "converted", plugin=plugin, layouts=["sha256:of-another-plan"])
    with pytest.raises(WeightError, match=r"was made with llmfw-llama 0\.0\.1") as caught:
        load_model(tmp_path / "converted")
    assert "convert the model again" in str(caught.value.hint)
    with pytest.raises(WeightError, match="maps its weights otherwise"):
        export_checkpoint(tmp_path / "converted", tmp_path / "back")


def test_what_others_write_needs_no_more_than_config_and_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    for name in ("checksums.json", "source.json"):
        (tmp_path / "converted" / name).unlink()
    changed_config(
        tmp_path / "converted", layouts=[], plugin={"distribution": "a-tool", "version": "1"}
    )
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(source))
    assert "was made with a-tool 1" in caplog.text
    with pytest.raises(CheckpointError, match=r"keeps no headers .* \(source\.json\)"):
        export_checkpoint(tmp_path / "converted", tmp_path / "back")


@pytest.mark.parametrize("lost", ["hf/config.json", "rank0.safetensors"])
def test_a_lost_file_is_named(lost: str, tmp_path: Path):
    convert_checkpoint(written(LLAMA, tmp_path / "source"), tmp_path / "converted")
    (tmp_path / "converted" / lost).unlink()
    done = run("run", "--model", str(tmp_path / "converted"), "hi")
    assert done.exit_code in (ConfigError.exit_code, CheckpointError.exit_code)
    assert f"{lost}" in done.stderr
    assert "is missing" in done.stderr
    assert "or convert the model again" in done.stderr


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    file = tmp_path / "converted" / "rank0.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("model.norm.weight")
    tensors["model.norms.weight"] = lost
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, file)
    with pytest.raises(WeightError) as caught:
        load_model(tmp_path / "converted")
    lines = [" ".join(line.split()) for line in caught.value.message.splitlines()]
    assert any(line.startswith("missing model.norm.weight") for line in lines)
    assert any(line.startswith("surplus model.norms.weight") for line in lines)
    assert any(line.startswith("shape model.layers.0.mlp.down_proj.weight") for line in lines)


def test_the_classmethod_behind_it(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    model = DecoderModelForCausalLM.from_hugging_face(source, "float16", kernels="reference")
    model.save_checkpoint(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["converted_dtype"] == "float16"
    assert resolve_model(tmp_path / "saved").kind == "checkpoint"
    other = load_model(tmp_path / "saved", kernels="reference").model
    with pytest.raises(UsageError, match="was not loaded from a directory"):
        other.save_checkpoint(tmp_path / "again")


def test_only_what_is_left_is_read_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of two runs the second reads what the first had not done, and the result is the same."""
    source = written(LLAMA, tmp_path / "source")
    whole = convert_checkpoint(source, tmp_path / "whole")
    real, read = convert.read_parameter, []

    def failing(filled: Any, *rest: Any) -> torch.Tensor:
        if len(read) == 7:
            raise OSError(28, "No space left on device")
        read.append(filled.slot.path)
        return real(filled, *rest)

    monkeypatch.setattr(convert, "read_parameter", failing)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        convert_checkpoint(source, tmp_path / "out", sync_bytes=1)
    assert "what is done is kept" in str(caught.value.hint)
    assert staging_path(tmp_path / "out").is_dir()
    first, read = read, []
    monkeypatch.setattr(convert, "read_parameter", lambda *all: read.append(all[0]) or real(*all))
    report = convert_checkpoint(source, tmp_path / "out")
    assert report.resumed == len(first) == 7
    assert len(read) == whole.tensors - 7
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_is_done_stays_done_where_it_is_stopped(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", progress=stop)
    report = convert_checkpoint(source, tmp_path / "out")
    assert 0 < report.resumed < report.tensors
    convert_checkpoint(source, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_ctrl_c_tells_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(LLAMA, tmp_path / "source")
    real, read = convert.read_parameter, []

    def stopped(filled: Any, *rest: Any) -> torch.Tensor:
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(filled.slot.path)
        return real(filled, *rest)

    monkeypatch.setattr(convert, "read_parameter", stopped)
    done = run("convert", str(source), str(tmp_path / "out"))
    assert done.exit_code == 130
    assert f"the same command goes on from what is in {tmp_path / '.out.part'}" in done.stderr
    monkeypatch.undo()
    done = run("convert", str(source), str(tmp_path / "out"))
    assert "7 of them by an earlier run" in done.stderr


def test_nothing_is_left_where_nothing_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(LLAMA, tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(CheckpointError, match="5000 are free there"):
        convert_checkpoint(source, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        convert_checkpoint(source, source / "config.json" / "out")
    assert caught.value.hint == "choose a directory where you may write"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_changed_source_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = written(LLAMA, tmp_path / "source")
    half = staging_path(tmp_path / "out")
    half.mkdir()
    identity = {"identity": {"source": "another"}}
    (half / "journal.jsonl").write_text(json.dumps(identity) + "\n")
    (half / "rank0.safetensors").write_bytes(b"half")
    convert_checkpoint(source, tmp_path / "out")
    assert "thrown away" in caplog.text
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(source))


def test_a_source_that_changes_under_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = written(LLAMA, tmp_path / "source")
    real = convert.record_source

    def slow(checkpoint: Any) -> Any:
        record = real(checkpoint)
        first = next(source.glob("*.safetensors"))
        first.write_bytes(first.read_bytes())
        return record

    monkeypatch.setattr(convert, "record_source", slow)
    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("verify",), ("new", "Another", "--from")])
def test_what_needs_the_original_says_so(command: tuple[str, ...], tmp_path: Path):
    convert_checkpoint(written(LLAMA, tmp_path / "source"), tmp_path / "converted")
    done = run(*command, str(tmp_path / "converted"))
    assert done.exit_code == UsageError.exit_code
    assert "reads no converted checkpoint" in done.stderr
    assert "llmfw export" in done.stderr


PLUGIN = """
from llmfw import StockDecoderForCausalLM, hookimpl
from llmfw.plugins import register_local


class Own(StockDecoderForCausalLM):
    def load_weights(self, weights):
        raise AssertionError("never asked")


class Plugin:
    @hookimpl
    def llmfw_model(self, model_config):
        return {model}(model_config)


register_local("TinyForCausalLM", Plugin(), __file__)
"""


def tiny_source(folder: Path, model: str) -> Path:
    """A model that a plugin in a file serves."""
    write(LLAMA, folder, tensors_of(LLAMA))
    changed_config(folder, architectures=["TinyForCausalLM"])
    (folder / "my_plugin.py").write_text(PLUGIN.replace("{model}", model))
    return folder


@pytest.fixture
def _no_local_plugin() -> Iterator[None]:
    yield
    unregister_local("TinyForCausalLM")


@pytest.mark.usefixtures("_no_local_plugin")
def test_a_plugin_in_a_file_is_known_by_its_digest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = tiny_source(tmp_path / "source", "StockDecoderForCausalLM")
    file = source / "my_plugin.py"
    out = tmp_path / "converted"
    done = run("convert", str(source), str(out), "--plugin-module", str(file))
    assert done.exit_code == 0, done.stderr
    plugin = json.loads((out / "config.json").read_text())["plugin"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert plugin == {"distribution": "my_plugin.py", "version": f"sha256:{digest}"}
    assert torch.equal(logits_of(out), logits_of(source))
    assert "was made with" not in caplog.text


@pytest.mark.usefixtures("_no_local_plugin")
def test_weights_that_an_author_loads_himself_are_not_converted(tmp_path: Path):
    source = tiny_source(tmp_path / "source", "Own")
    with pytest.raises(WeightError, match="loads its weights by a load_weights of its own"):
        convert_checkpoint(source, tmp_path / "out", plugin_modules=[str(source / "my_plugin.py")])
