from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmfw.errors import (
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
    UsageError,
)
from llmfw.plugins import (
    find_local,
    load_plugin_module,
    local,
    register_local,
    unregister_local,
)
from plugin_fakes import check_golden

REGISTERS = """
import sys
from llmfw.plugins import register_local
register_local("{name}", sys.modules[__name__], __file__)
RUNS = []
"""


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local, "_registry", {})
    monkeypatch.setattr(local, "_loaded_files", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("llmfw_local_"):
            del sys.modules[name]


def test_register_find_and_forget() -> None:
    plugin = object()
    register_local("MineForCausalLM", plugin, "__main__")
    found = find_local("MineForCausalLM")
    assert found is not None
    assert found.plugin is plugin
    assert found.label == "local plugin __main__"
    assert found.is_main
    assert (found.path, found.sha256) == (None, None)
    unregister_local("MineForCausalLM")
    assert find_local("MineForCausalLM") is None


def test_the_file_and_its_digest_are_recorded(tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text(REGISTERS.format(name="MineForCausalLM"))
    module = load_plugin_module(str(file))
    found = find_local("MineForCausalLM")
    assert found is not None
    assert found.plugin is module
    assert found.path == file.resolve()
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not found.is_main


def test_a_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text(REGISTERS.format(name="MineForCausalLM"))
    first = load_plugin_module(file)
    assert load_plugin_module(file) is first
    file.write_text(REGISTERS.format(name="MineForCausalLM") + "# changed\n")
    second = load_plugin_module(file)
    assert second is not first
    found = find_local("MineForCausalLM")
    assert found is not None
    assert found.plugin is second


def test_a_module_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "local_package_x"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(REGISTERS.format(name="DottedForCausalLM"))
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugin_module("local_package_x.model")
    assert find_local("DottedForCausalLM") is not None


def test_two_origins_of_one_architecture_are_an_error() -> None:
    register_local("MineForCausalLM", object(), "one.py")
    register_local("MineForCausalLM", object(), "one.py")
    with pytest.raises(PluginConflictError) as caught:
        register_local("MineForCausalLM", object(), "two.py")
    check_golden("local_registered_twice", caught.value)


def test_a_file_that_raises_is_a_load_error(tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text("x = 1\nimport no_such_module_here\n")
    before = set(sys.modules)
    with pytest.raises(PluginLoadError) as caught:
        load_plugin_module(file)
    check_golden("plugin_module_raises", caught.value, folder=tmp_path)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert set(sys.modules) == before


def test_a_file_that_registers_nothing(tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text("x = 1\n")
    with pytest.raises(PluginContractError) as caught:
        load_plugin_module(file)
    check_golden("plugin_module_registers_nothing", caught.value, folder=tmp_path)


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_plugin_module(tmp_path / "none.py")
    check_golden("plugin_module_no_file", caught.value, folder=tmp_path)
    with pytest.raises(UsageError) as caught:
        load_plugin_module("no_such_package.model")
    check_golden("plugin_module_no_module", caught.value)


def test_ctrl_c_in_a_file_stays_ctrl_c(tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugin_module(file)
