from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from llmfw.errors import (
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
    UsageError,
)
from llmfw.plugins import (
    Catalog,
    load_plugin_module,
    load_reference,
    local,
    reference_to,
    register_local,
    resolve_plugin,
)
from plugin_fakes import check_golden, model_dist, write_dist

REGISTERS = """
from llmfw.plugins import register_local
register_local("MineForCausalLM", "mine", __file__)
"""


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process knows of local plugins: nothing."""
    monkeypatch.setattr(local, "_registry", {})
    monkeypatch.setattr(local, "_loaded_files", {})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    model_dist(tmp_path, "ref-foo", "FooForCausalLM", version="1.0", code="plugin = 'foo'\n")
    write_dist(
        tmp_path,
        "ref-ext",
        entry_points={"llmfw.extensions": {"int8": "ref_ext:extension"}},
        code="extension = 'int8'\n",
    )
    return tmp_path


def test_an_installed_plugin_and_its_extensions_are_found_again(site: Path) -> None:
    catalog = Catalog.scan([str(site)])
    resolved = resolve_plugin("FooForCausalLM", extensions=["int8"], catalog=catalog)
    reference = pickle.loads(pickle.dumps(reference_to(resolved)))
    assert load_reference(reference, catalog) == resolved


def test_another_version_is_refused(site: Path, tmp_path: Path) -> None:
    resolved = resolve_plugin("FooForCausalLM", catalog=Catalog.scan([str(site)]))
    other = tmp_path / "other"
    model_dist(other, "ref-foo", "FooForCausalLM", version="1.1")
    with pytest.raises(PluginConflictError) as caught:
        load_reference(reference_to(resolved), Catalog.scan([str(other)]))
    check_golden("worker_has_another_version", caught.value)
    with pytest.raises(PluginLoadError) as missing:
        load_reference(reference_to(resolved), Catalog.scan([str(tmp_path / "empty")]))
    check_golden("worker_lacks_the_plugin", missing.value)


def test_a_file_is_loaded_again_by_path_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(REGISTERS)
    load_plugin_module(file)
    empty = Catalog.scan([])
    resolved = resolve_plugin("MineForCausalLM", catalog=empty)
    reference = reference_to(resolved)
    forget(monkeypatch)
    assert load_reference(reference, empty).plugin == "mine"
    forget(monkeypatch)
    file.write_text(REGISTERS + "# changed\n")
    with pytest.raises(PluginConflictError) as caught:
        load_reference(reference, empty)
    check_golden("worker_has_another_file", caught.value, folder=tmp_path)


def test_a_file_that_registers_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(REGISTERS)
    load_plugin_module(file)
    reference = reference_to(resolve_plugin("MineForCausalLM", catalog=Catalog.scan([])))
    forget(monkeypatch)
    file.write_text(REGISTERS.replace("Mine", "Other"))
    with pytest.raises(PluginContractError, match="does not register MineForCausalLM"):
        load_reference(reference, Catalog.scan([]))


def test_a_class_of_the_running_script_has_no_reference() -> None:
    register_local("MineForCausalLM", object(), "__main__")
    resolved = resolve_plugin("MineForCausalLM", catalog=Catalog.scan([]))
    with pytest.raises(UsageError) as caught:
        reference_to(resolved)
    check_golden("class_of_the_running_script", caught.value)
