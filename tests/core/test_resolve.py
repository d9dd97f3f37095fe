from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmfw.errors import (
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
    UnknownArchitectureError,
    UsageError,
)
from llmfw.plugins import (
    Catalog,
    collect_kernels,
    load_kernel_packs,
    local,
    register_local,
    resolve_plugin,
)
from plugin_fakes import check_golden, model_dist, write_dist

PACK = """
from llmfw.plugins import hookimpl
class Pack:
    {requires}
    @hookimpl
    def llmfw_kernels(self, {argument}):
        {body}
pack = Pack()
"""


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_registry", {})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def scan(site: Path) -> Catalog:
    return Catalog.scan([str(site)])


def test_only_the_owner_is_imported(site: Path) -> None:
    model_dist(site, "resolve-foo", "FooForCausalLM", code="plugin = 'foo'\n")
    model_dist(site, "resolve-sick", "SickForCausalLM", code="raise SystemExit('imported')\n")
    resolved = resolve_plugin("FooForCausalLM", catalog=scan(site))
    assert resolved.plugin == "foo"
    assert resolved.label == "resolve-foo 0.1.0"
    assert resolved.entry is not None
    with pytest.raises(PluginLoadError, match="SystemExit: imported"):
        resolve_plugin("SickForCausalLM", catalog=scan(site))


def test_a_local_plugin_wins_with_one_logged_line(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dist(site, "resolve-hidden", "FooForCausalLM", code="plugin = 'installed'\n")
    register_local("FooForCausalLM", "mine", "script.py")
    with caplog.at_level(logging.INFO, "llmfw.plugins"):
        assert resolve_plugin("FooForCausalLM", catalog=scan(site)).plugin == "mine"
    assert [record.getMessage() for record in caplog.records] == [
        "FooForCausalLM is served by local plugin script.py, "
        "not by the installed resolve-hidden 0.1.0"
    ]
    demanded = resolve_plugin("FooForCausalLM", prefer="resolve-hidden", catalog=scan(site))
    assert demanded.plugin == "installed"


def test_modules_of_the_environment_are_loaded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site / "mine.py"
    file.write_text(
        "from llmfw.plugins import register_local\n"
        "register_local('EnvForCausalLM', 'from the environment', __file__)\n"
    )
    monkeypatch.setenv("LLMFW_PLUGIN_MODULES", str(file))
    resolved = resolve_plugin("EnvForCausalLM", catalog=scan(site))
    assert resolved.plugin == "from the environment"
    monkeypatch.setenv("LLMFW_PLUGIN_MODULES", str(site / "none.py"))
    with pytest.raises(UsageError, match="no such plugin file"):
        resolve_plugin("EnvForCausalLM", catalog=scan(site))


def test_unknown_is_found_before_any_import(site: Path) -> None:
    model_dist(site, "resolve-trap", "FooForCausalLM", code="raise SystemExit('imported')\n")
    with pytest.raises(UnknownArchitectureError):
        resolve_plugin("BarForCausalLM", catalog=scan(site))


def test_extensions_are_off_unless_named(site: Path) -> None:
    model_dist(site, "resolve-base", "FooForCausalLM", code="plugin = 'foo'\n")
    write_dist(
        site,
        "resolve-ext",
        entry_points={"llmfw.extensions": {"int8": "resolve_ext:extension"}},
        code="extension = 'int8'\n",
    )
    assert resolve_plugin("FooForCausalLM", catalog=scan(site)).extensions == ()
    resolved = resolve_plugin("FooForCausalLM", extensions=["int8"], catalog=scan(site))
    assert resolved.extensions == (("extension int8 of resolve-ext 0.1.0", "int8"),)
    with pytest.raises(UsageError) as caught:
        resolve_plugin("FooForCausalLM", extensions=["int4"], catalog=scan(site))
    check_golden("unknown_extension", caught.value)


def test_two_owners_of_an_extension(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ext-a", "ext-b"):
        points = {"llmfw.extensions": {"int8": f"{name.replace('-', '_')}:extension"}}
        write_dist(site, name, entry_points=points, code=f"extension = {name!r}\n")
    register_local("FooForCausalLM", object(), "foo.py")
    with pytest.raises(PluginConflictError) as caught:
        resolve_plugin("FooForCausalLM", extensions=["int8"], catalog=scan(site))
    check_golden("two_owners_of_an_extension", caught.value)


@dataclass(frozen=True)
class FakeKernel:
    op: str = "rms_norm"
    name: str = "fake.rms_norm"
    factory: str = "x:y"
    pack: str = ""

    def from_pack(self, pack: str) -> FakeKernel:
        return replace(self, pack=pack)


def write_pack(
    site: Path, name: str, body: str = "return []", *, argument: str = "device", requires: str = ""
) -> None:
    code = PACK.format(body=body, argument=argument, requires=requires)
    module = f"pack_{name}"
    points = {"llmfw.kernels": {name: f"{module}:pack"}}
    write_dist(site, module.replace("_", "-"), entry_points=points, code=code)


def test_a_broken_pack_is_left_out_named_and_harms_no_other(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pack(site, "good", "return device.kernels")
    write_pack(site, "contract", argument="dev")
    write_pack(site, "raises", "raise RuntimeError('no compiler')")
    write_pack(site, "returns", "return ['not a kernel']")
    write_dist(
        site,
        "pack-sick",
        entry_points={"llmfw.kernels": {"sick": "pack_sick:pack"}},
        code="import nope\n",
    )
    with caplog.at_level(logging.WARNING, "llmfw.plugins"):
        packs, problems = load_kernel_packs({"cpu"}, scan(site))
        kernels, more = collect_kernels(packs, SimpleNamespace(kernels=[FakeKernel()]))  # type: ignore[arg-type]
    assert [entry.name for entry, _ in packs] == ["good", "raises", "returns"]
    assert kernels == [FakeKernel(pack="good")]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "the kernel pack contract of pack-contract 0.1.0 is left out: kernel pack contract of "
        "pack-contract 0.1.0 breaks the plugin contract: llmfw_kernels: unknown argument 'dev'; "
        "the contract has device",
        "the kernel pack sick of pack-sick 0.1.0 is left out: pack-sick 0.1.0 cannot be loaded "
        "(entry point sick = pack_sick:pack in llmfw.kernels): "
        "ModuleNotFoundError: No module named 'nope'",
        "the kernel pack raises of pack-raises 0.1.0 is left out: llmfw_kernels of kernel pack "
        "raises of pack-raises 0.1.0 raised RuntimeError: no compiler",
        "the kernel pack returns of pack-returns 0.1.0 is left out: kernel pack returns of "
        "pack-returns 0.1.0 breaks the plugin contract: llmfw_kernels returned str, "
        "expected a list of llmfw.Kernel",
    ]
    assert [problem.pack for problem in (*problems, *more)] == [
        "contract",
        "sick",
        "raises",
        "returns",
    ]


@pytest.mark.parametrize("wanted", ["sick", "sick.rms_norm", "rms_norm=sick"])
def test_a_broken_pack_that_was_asked_for_is_an_error(site: Path, wanted: str) -> None:
    points = {"llmfw.kernels": {"sick": "pack_sick2:pack"}}
    write_dist(site, "pack-sick2", entry_points=points, code="import nope\n")
    with pytest.raises(PluginLoadError, match="No module named 'nope'"):
        load_kernel_packs({"cpu"}, scan(site), wanted=[wanted])
    assert len(load_kernel_packs({"cpu"}, scan(site), wanted=["-sick"])[1]) == 1
    write_pack(site, "raising", "raise OSError('x')")
    packs, _ = load_kernel_packs({"cpu"}, scan(site))
    device: Any = None
    with pytest.raises(Exception, match="raised OSError: x"):
        collect_kernels(packs, device, wanted=["raising"])


def test_a_pack_for_another_device_is_passed_over(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pack(site, "gpu_only", requires="requires = ('cuda',)")
    assert load_kernel_packs({"cpu"}, scan(site)) == ([], [])
    assert not caplog.records
    packs, _ = load_kernel_packs({"cuda"}, scan(site))
    assert len(packs) == 1


def test_two_packs_of_one_name_are_both_left_out(
    site: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("twin-a", "twin-b"):
        points = {"llmfw.kernels": {"twin": f"{name.replace('-', '_')}:pack"}}
        write_dist(site, name, entry_points=points, code="pack = object()\n")
    packs, problems = load_kernel_packs({"cpu"}, scan(site))
    assert packs == []
    assert [record.getMessage() for record in caplog.records] == [
        "the kernel pack twin is left out: the kernel pack 'twin' is served by 2 installed "
        "plugins: twin-a 0.1.0, twin-b 0.1.0"
    ]
    assert isinstance(problems[0].error, PluginConflictError)
    monkeypatch.setenv("LLMFW_PREFER", "twin-b")
    packs, _ = load_kernel_packs({"cpu"}, scan(site))
    assert [entry.dist for entry, _ in packs] == ["twin-b"]


def test_a_pack_that_does_not_fit_says_what_it_lacks_in_one_line(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = {"llmfw.kernels": {"old": "pack_old:pack"}}
    lacking = ("absent>=1", "gone")
    write_dist(site, "pack-old", entry_points=points, requires=lacking, code="pack = object()\n")
    packs, (problem,) = load_kernel_packs({"cpu"}, scan(site))
    assert packs == []
    assert problem.reason == (
        "pack-old 0.1.0 does not fit what is installed: requires absent>=1, which is not installed;"
        " requires gone, which is not installed"
    )
    assert problem.reason in caplog.text


def test_a_disabled_pack_is_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"llmfw.kernels": {"off": "pack_off:pack"}}
    write_dist(site, "pack-off", entry_points=points, code="raise SystemExit('imported')\n")
    monkeypatch.setenv("LLMFW_DISABLE_PLUGINS", "pack-off")
    assert load_kernel_packs({"cpu"}, scan(site)) == ([], [])


def test_the_contract_error_of_a_model_plugin_is_found_by_its_host(site: Path) -> None:
    from llmfw.plugins import PluginHost

    code = "from llmfw.plugins import hookimpl\n@hookimpl\ndef llmfw_modell(x): ...\n"
    points = {"llmfw.models": {"BadForCausalLM": "bad_hooks"}}
    write_dist(site, "bad-hooks", entry_points=points, code=code)
    resolved = resolve_plugin("BadForCausalLM", catalog=scan(site))
    with pytest.raises(PluginContractError, match="did you mean llmfw_model"):
        PluginHost(resolved.plugin, name=resolved.label, defaults=object())
