from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmfw.errors import (
    PluginConflictError,
    PluginLoadError,
    UnknownArchitectureError,
    UsageError,
)
from llmfw.plugins import Catalog
from plugin_fakes import check_golden, model_dist, write_dist


@pytest.fixture
def two(tmp_path: Path) -> Catalog:
    """Two families, one architecture each, and one that both serve."""
    model_dist(tmp_path, "llmfw-foo", "FooForCausalLM", "SharedForCausalLM")
    model_dist(tmp_path, "fast-bar", "BarForCausalLM", "SharedForCausalLM", version="2.0")
    return Catalog.scan([str(tmp_path)])


def test_scan_reads_groups_names_and_requirements(tmp_path: Path) -> None:
    write_dist(
        tmp_path,
        "llmfw-foo",
        "1.2",
        entry_points={
            "llmfw.models": {"FooForCausalLM": "foo:plugin"},
            "llmfw.kernels": {"foo": "foo.kernels:pack"},
            "llmfw.extensions": {"int8": "foo.int8"},
            "llmfw.aliases": {"tiny": "foo.demo:path"},
            "console_scripts": {"foo": "foo:main"},
        },
        requires=("llmfw-core>=0.1,<0.2",),
    )
    write_dist(tmp_path, "unrelated", entry_points={"console_scripts": {"x": "y:z"}})
    catalog = Catalog.scan([str(tmp_path)])
    assert [(e.group, e.name, e.value) for e in catalog.entries] == [
        ("llmfw.aliases", "tiny", "foo.demo:path"),
        ("llmfw.extensions", "int8", "foo.int8"),
        ("llmfw.kernels", "foo", "foo.kernels:pack"),
        ("llmfw.models", "FooForCausalLM", "foo:plugin"),
    ]
    (entry,) = catalog.models["FooForCausalLM"]
    assert entry.label == "llmfw-foo 1.2"
    assert entry.requires == ("llmfw-core>=0.1,<0.2",)
    assert set(catalog.aliases) == {"tiny"}
    assert set(catalog.extensions) == {"int8"}
    assert set(catalog.kernels) == {"foo"}


def test_a_distribution_seen_twice_counts_once_the_first_on_the_path(tmp_path: Path) -> None:
    model_dist(tmp_path / "a", "llmfw-foo", "FooForCausalLM", version="0.2.0")
    model_dist(tmp_path / "b", "LLMFW_foo", "FooForCausalLM", version="0.1.0")
    catalog = Catalog.scan([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [entry.version for entry in catalog.models["FooForCausalLM"]] == ["0.2.0"]


def test_one_object_may_serve_two_architectures(two: Catalog) -> None:
    assert two.find("FooForCausalLM").value == "llmfw_foo:plugin"
    assert two.find("BarForCausalLM").label == "fast-bar 2.0"


def test_a_damaged_distribution_hides_no_other(tmp_path: Path) -> None:
    model_dist(tmp_path, "llmfw-foo", "FooForCausalLM")
    broken = write_dist(tmp_path, "broken", entry_points={"llmfw.models": {"X": "x:y"}})
    (broken / "METADATA").write_text("Metadata-Version: 2.4\n\n", "utf-8")
    catalog = Catalog.scan([str(tmp_path)])
    assert set(catalog.models) == {"FooForCausalLM"}
    assert len(catalog.problems) == 1
    assert "broken-0.1.0.dist-info: its METADATA lacks Name" in catalog.problems[0]


def test_unknown_architecture(two: Catalog) -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        two.find("FooForCasualLM")
    check_golden("unknown_architecture", caught.value)


def test_unknown_architecture_with_nothing_installed(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        Catalog.scan([str(tmp_path)]).find("FooForCausalLM")
    check_golden("unknown_architecture_nothing_installed", caught.value)


def test_two_owners_are_an_error(two: Catalog) -> None:
    with pytest.raises(PluginConflictError) as caught:
        two.find("SharedForCausalLM")
    check_golden("two_owners", caught.value)


@pytest.mark.parametrize("name", ["fast-bar", "Fast_Bar"])
def test_an_owner_is_chosen_by_flag_or_environment(
    two: Catalog, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert two.find("SharedForCausalLM", prefer=name).dist == "fast-bar"
    monkeypatch.setenv("LLMFW_PREFER", name)
    assert two.find("SharedForCausalLM").dist == "fast-bar"
    assert two.find("FooForCausalLM").dist == "llmfw-foo", "a preference is not a demand"


def test_the_flag_is_a_demand(two: Catalog) -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        two.find("FooForCausalLM", prefer="fast-bar")
    check_golden("demanded_plugin_does_not_serve", caught.value)
    with pytest.raises(UsageError) as usage:
        two.find("FooForCausalLM", prefer="llmfw-fo")
    check_golden("demanded_plugin_not_installed", usage.value)


def test_one_distribution_that_declares_an_architecture_twice(tmp_path: Path) -> None:
    info = model_dist(tmp_path, "llmfw-foo", "FooForCausalLM")
    with (info / "entry_points.txt").open("a", encoding="utf-8") as file:
        file.write("FooForCausalLM = other:plugin\nFooForCausalLM = other:plugin\n")
    with pytest.raises(PluginConflictError) as caught:
        Catalog.scan([str(tmp_path)]).find("FooForCausalLM")
    check_golden("one_owner_twice", caught.value)


def test_disabled_plugins_do_not_serve_and_the_error_says_why(
    two: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFW_DISABLE_PLUGINS", "llmfw-foo")
    assert two.find("SharedForCausalLM").dist == "fast-bar"
    with pytest.raises(UnknownArchitectureError) as caught:
        two.find("FooForCausalLM")
    check_golden("switched_off", caught.value)


def test_the_allow_list_leaves_only_its_members(
    two: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFW_PLUGINS", "fast-bar")
    assert two.find("SharedForCausalLM").dist == "fast-bar"
    with pytest.raises(UnknownArchitectureError, match="not in LLMFW_PLUGINS"):
        two.find("FooForCausalLM")


@pytest.mark.parametrize("variable", ["LLMFW_PLUGINS", "LLMFW_DISABLE_PLUGINS", "LLMFW_PREFER"])
def test_a_bad_value_in_the_environment_is_an_error(
    two: Catalog, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "llmfw-fooo")
    with pytest.raises(UsageError) as caught:
        two.find("FooForCausalLM")
    assert str(caught.value) == (
        f"{variable} names 'llmfw-fooo', and no plugin of that name is installed\n"
        "did you mean 'llmfw-foo'? installed: fast-bar, llmfw-foo"
    )
    monkeypatch.setenv(variable, "llmfw-foo,,fast-bar")
    with pytest.raises(UsageError, match="has an empty value"):
        two.find("FooForCausalLM")


def test_a_broken_import_is_never_an_unknown_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dist(tmp_path, "llmfw-sick", "SickForCausalLM", code="import no_such_module_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginLoadError) as caught:
        Catalog.scan([str(tmp_path)]).find("SickForCausalLM").load()
    check_golden("broken_import", caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("sick_values:nothing", "AttributeError: module 'sick_values' has no attribute 'nothing'"),
        ("sick values", "the entry point is not of the form module:attribute"),
        ("sick_exits:plugin", "SystemExit: 3"),
    ],
)
def test_every_way_to_fail_is_a_load_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    (tmp_path / "sick_values.py").write_text("")
    (tmp_path / "sick_exits.py").write_text("raise SystemExit(3)\n")
    write_dist(tmp_path, "sick", entry_points={"llmfw.models": {"SickForCausalLM": value}})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginLoadError) as caught:
        Catalog.scan([str(tmp_path)]).find("SickForCausalLM").load()
    assert caught.value.message == (
        "sick 0.1.0 cannot be loaded"
        f" (entry point SickForCausalLM = {value} in llmfw.models): {reason}"
    )


def test_a_scan_imports_no_plugin_and_no_torch(tmp_path: Path) -> None:
    model_dist(tmp_path, "llmfw-foo", "FooForCausalLM", code="raise SystemExit('imported')\n")
    code = (
        "import sys; from llmfw.plugins import Catalog\n"
        "assert Catalog.scan().models['FooForCausalLM']\n"
        "heavy = {'torch', 'transformers', 'llmfw_foo', 'llmfw_llama'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    subprocess.run(command, check=True)
