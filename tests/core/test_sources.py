"""What a user may call a model, and what he is told when there is none."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

import llmfw.weights.sources
from gguf_files import decoder_tensors, write_gguf
from llmfw.errors import CheckpointError, ConfigError, PluginLoadError
from llmfw.weights import open_checkpoint, resolve_model

Declare = Callable[..., None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Declares aliases as `name="module:function"` in place of those installed."""

    def install(**values: str | list[str]) -> None:
        entries = [
            importlib.metadata.EntryPoint(name, value, "llmfw.aliases")
            for name, given in values.items()
            for value in ([given] if isinstance(given, str) else given)
        ]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)

    return install


def test_a_directory(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(model_dir))
    assert (source.kind, source.model_dir, source.checkpoint_path) == (
        "directory",
        model_dir,
        model_dir,
    )
    monkeypatch.setenv("HOME", str(model_dir.parent))
    assert resolve_model("~/model").model_dir == model_dir


@pytest.mark.parametrize("alone", [False, True])
def test_a_gguf_file_or_a_directory_with_one(tmp_path: Path, alone: bool) -> None:
    (tmp_path / "g").mkdir()
    file = write_gguf(tmp_path / "g" / "x.gguf", decoder_tensors())
    source = resolve_model(str(file.parent if alone else file))
    assert source.kind == "gguf"
    assert (source.model_dir / "config.json").is_file()
    assert "model.norm.weight" in open_checkpoint(source.checkpoint_path).names()


def test_an_alias(model_dir: Path, declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmfw.weights.sources, "demo", lambda: model_dir, raising=False)
    declare(tiny="llmfw.weights.sources:demo")
    source = resolve_model("tiny")
    assert (source.name, source.kind, source.model_dir) == ("tiny", "alias", model_dir)


def test_a_directory_of_an_alias_s_name_comes_first(
    model_dir: Path, declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(model="llmfw.weights.sources:nothing")
    monkeypatch.chdir(model_dir.parent)
    assert resolve_model("model").kind == "directory"


def test_an_alias_of_two_plugins_or_a_broken_one(declare: Declare) -> None:
    declare(tiny=["a.b:c", "d.e:f"], broken="llmfw.weights.sources:nothing")
    with pytest.raises(
        ConfigError, match=r"alias 'tiny' is declared by several plugins: a.b:c, d.e:f"
    ):
        resolve_model("tiny")
    with pytest.raises(PluginLoadError, match=r"alias 'broken' .* fails: AttributeError"):
        resolve_model("broken")


def test_an_unknown_name_gets_the_nearest(declare: Declare) -> None:
    declare(tiny="a:b", other="c:d")
    with pytest.raises(ConfigError) as caught:
        resolve_model("tinny")
    assert str(caught.value) == (
        "model 'tinny' is no directory, no .gguf file and no hub id (organisation/name); "
        "aliases: other, tiny\ndid you mean 'tiny'?"
    )
    declare()
    with pytest.raises(ConfigError, match=r"hub id \(organisation/name\)\ngive the path"):
        resolve_model("tinny")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json there"):
        resolve_model(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.gguf: no such file"):
        resolve_model(tmp_path / "none.gguf")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="not a model"):
        resolve_model(tmp_path / "notes.txt")
    (tmp_path / "bad.gguf").write_text("nonsense")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        resolve_model(tmp_path / "bad.gguf")
    (tmp_path / "worse.gguf").write_text("")
    with pytest.raises(ConfigError, match="2 GGUF files there"):
        resolve_model(tmp_path)


def test_a_hub_id(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "organisation/model-1.5"
        assert "*.safetensors" in allow_patterns
        assert "consolidated*" in ignore_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_model("organisation/model-1.5")
    assert (source.kind, source.model_dir) == ("hub", model_dir)


def test_a_hub_id_offline_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="'nobody/nothing' is no directory here") as caught:
        resolve_model("nobody/nothing")
    assert "offline: download it elsewhere and give its directory" in str(caught.value)


def test_finding_a_directory_imports_no_hub_no_gguf_and_no_transformers(model_dir: Path) -> None:
    code = (
        "import sys; from llmfw.weights import resolve_model; resolve_model(sys.argv[1]);"
        "print([m for m in ('huggingface_hub', 'gguf', 'transformers', 'tokenizers')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
