from __future__ import annotations

import logging
from collections.abc import Generator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llmfw.errors import (
    ConfigError,
    PluginContractError,
    PluginError,
    UsageError,
)
from llmfw.plugins import PluginHost, hookimpl, hookspecs
from llmfw.plugins.contract import ARGUMENTS
from plugin_fakes import check_golden


class Defaults:
    """Core's defaults, deliberately without `trylast`: the host sees to that."""

    @hookimpl
    def llmfw_config(self, raw: dict[str, Any]) -> str:
        return "default config"

    @hookimpl
    def llmfw_layer(self, kind: str) -> str:
        return f"stock {kind}"

    @hookimpl
    def llmfw_model(self) -> None:
        raise RuntimeError("a fault of core")


def host(plugin: object, *extensions: tuple[str, object]) -> PluginHost:
    return PluginHost(plugin, name="llmfw-foo 0.1.0", defaults=Defaults(), extensions=extensions)


def plugin_of(**functions: Any) -> object:
    """An object whose attributes are marked hook implementations."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})


def test_the_contract_is_these_hooks_and_arguments() -> None:
    assert ARGUMENTS == {
        "llmfw_config": ("raw", "model_dir"),
        "llmfw_model": ("model_config",),
        "llmfw_layer": ("kind", "role", "model_config", "layer_idx", "spec"),
        "llmfw_weight_map": ("model_config", "checkpoint"),
        "llmfw_kernels": ("device",),
    }


@pytest.mark.parametrize("name", hookspecs.HOOK_NAMES)
def test_every_hook_is_documented(name: str) -> None:
    text = getattr(hookspecs, name).__doc__
    for argument in ARGUMENTS[name]:
        assert f":param {argument}:" in text
    assert ":returns:" in text
    assert "Called once for each" in text
    assert "Core's default" in text


def test_the_plugin_is_asked_first_then_extensions_then_defaults() -> None:
    def ask(plugin: object, *extensions: tuple[str, object]) -> Any:
        return host(plugin, *extensions).hook.llmfw_layer(
            kind="mlp", role="mlp", model_config=None, layer_idx=0, spec={}
        )

    mine = plugin_of(llmfw_layer=lambda kind: "mine")
    silent = plugin_of(llmfw_layer=lambda kind: None)
    extension = ("ext", plugin_of(llmfw_layer=lambda kind: "extension's"))
    assert ask(mine, extension) == "mine"
    assert ask(silent, extension) == "extension's"
    assert ask(silent) == "stock mlp"


def test_an_implementation_marked_trylast_is_still_asked_before_the_defaults() -> None:
    shy = SimpleNamespace(llmfw_config=hookimpl(trylast=True)(lambda raw: "shy"))
    assert host(shy).hook.llmfw_config(raw={}, model_dir=None) == "shy"


def test_an_extension_wraps_what_it_does_not_own() -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def llmfw_layer(self) -> Generator[None, str, str]:
            result = yield
            return f"wrapped {result}"

    asked = host(plugin_of(), ("wrap", Wrapper()))
    layer = {"kind": "norm", "role": "norm", "model_config": None, "layer_idx": 0, "spec": {}}
    assert asked.hook.llmfw_layer(**layer) == "wrapped stock norm"
    assert asked.implementers("llmfw_layer") == ["wrap", "core's defaults"]


def test_a_module_is_a_plugin_and_calls_are_counted() -> None:
    module = ModuleType("some_plugin")
    module.llmfw_config = hookimpl(lambda raw: raw["x"])  # type: ignore[attr-defined]
    asked = host(module)
    assert asked.calls == 0
    assert asked.hook.llmfw_config(raw={"x": 7}, model_dir=None) == 7
    assert asked.hook.llmfw_kernels(device=None) == []
    assert asked.calls == 2


def test_hosts_of_two_models_share_nothing() -> None:
    plugin = plugin_of(llmfw_config=lambda raw: "shared object")
    first, second = host(plugin), host(plugin)
    first.hook.llmfw_config(raw={}, model_dir=None)
    assert (first.calls, second.calls) == (1, 0)


def test_lazy_attributes_of_a_plugin_are_not_touched() -> None:
    class Lazy:
        @property
        def expensive(self) -> None:
            raise AssertionError("imported something heavy")

    host(Lazy())


FAULTS = {
    "unknown_hook": plugin_of(llmfw_confg=lambda raw: None),
    "unknown_argument": plugin_of(llmfw_layer=lambda kind, layer: None),
    "argument_with_default": plugin_of(llmfw_layer=lambda kind, role=None: None),
    "keyword_only_argument": plugin_of(llmfw_layer=lambda kind, *, role: None),
    "var_keywords": plugin_of(llmfw_model=lambda **kwargs: None),
    "not_marked": SimpleNamespace(llmfw_model=lambda model_config: None),
    "wrapper_that_does_not_yield": SimpleNamespace(
        llmfw_model=hookimpl(wrapper=True)(lambda model_config: None)
    ),
    "class_instead_of_instance": Defaults,
    "several_faults": plugin_of(llmfw_modle=lambda: None, llmfw_config=lambda path: None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_plugin_outside_the_contract_is_refused(name: str) -> None:
    with pytest.raises(PluginContractError) as caught:
        host(FAULTS[name])
    check_golden(f"contract_{name}", caught.value)


def test_a_generator_that_is_no_wrapper_is_refused() -> None:
    class Forgot:
        @hookimpl
        def llmfw_model(self) -> Generator[None, None, None]:
            yield

    with pytest.raises(PluginContractError, match=r"mark it with @hookimpl\(wrapper=True\)"):
        host(Forgot())


def test_an_optional_hook_of_a_later_contract_is_accepted() -> None:
    later = SimpleNamespace(llmfw_later=hookimpl(optionalhook=True)(lambda x: None))
    host(later)


def test_an_exception_is_attributed_to_the_plugin_that_raised_it() -> None:
    def llmfw_config(raw: dict[str, Any]) -> None:
        raise KeyError("hidden_size")

    with pytest.raises(PluginError) as caught:
        host(plugin_of(llmfw_config=llmfw_config)).hook.llmfw_config(raw={}, model_dir=None)
    line = llmfw_config.__code__.co_firstlineno + 1
    check_golden("exception_in_hook", caught.value, PLACE=f"{__file__}, line {line}")
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_ours_keeps_its_class_and_names_the_extension() -> None:
    def llmfw_config(raw: dict[str, Any]) -> None:
        raise ConfigError("no such rope")

    asked = host(plugin_of(), ("extension int8 of x 1.0", plugin_of(llmfw_config=llmfw_config)))
    with pytest.raises(ConfigError) as caught:
        asked.hook.llmfw_config(raw={}, model_dir=None)
    assert caught.value.__notes__ == ["raised in llmfw_config of extension int8 of x 1.0"]


def test_a_fault_of_core_is_not_blamed_on_the_plugin() -> None:
    with pytest.raises(RuntimeError, match="a fault of core") as caught:
        host(plugin_of()).hook.llmfw_model(model_config=None)
    assert caught.value.__notes__ == ["raised in llmfw_model of core's defaults"]


def test_nested_hooks_name_the_innermost_once() -> None:
    def llmfw_layer(kind: str) -> None:
        raise ValueError("bad layer")

    hosts: list[PluginHost] = []

    def llmfw_model(model_config: Any) -> Any:
        layer = {"kind": "mlp", "role": "mlp", "model_config": None, "layer_idx": 0, "spec": {}}
        return hosts[0].hook.llmfw_layer(**layer)

    hosts.append(host(plugin_of(llmfw_model=llmfw_model, llmfw_layer=llmfw_layer)))
    with pytest.raises(PluginError) as caught:
        hosts[0].hook.llmfw_model(model_config=None)
    assert caught.value.message == "llmfw_layer of llmfw-foo 0.1.0 raised ValueError: bad layer"
    assert caught.value.__notes__ == ["raised in llmfw_layer of llmfw-foo 0.1.0"]


def test_a_result_of_the_wrong_type_names_who_may_have_given_it() -> None:
    asked = host(plugin_of(llmfw_config=lambda raw: 3))
    result = asked.hook.llmfw_config(raw={}, model_dir=None)
    assert asked.expect("llmfw_config", result, int) == 3
    with pytest.raises(PluginContractError) as caught:
        asked.expect("llmfw_config", result, dict)
    check_golden("wrong_result", caught.value)


def test_an_extension_named_twice_is_an_error() -> None:
    extension = plugin_of()
    with pytest.raises(UsageError, match="given twice"):
        host(plugin_of(), ("ext", extension), ("ext", extension))


def test_tracing_logs_calls_results_and_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMFW_TRACE_HOOKS", "1")
    caplog.set_level(logging.INFO, "llmfw.plugins.trace")
    asked = host(plugin_of(llmfw_config=lambda raw: None))
    asked.hook.llmfw_config(raw={}, model_dir=None)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "llmfw_config(raw=dict, model_dir=None) -> 'default config'"
        " [llmfw-foo 0.1.0, core's defaults; "
    )
    monkeypatch.setenv("LLMFW_TRACE_HOOKS", "yes")
    with pytest.raises(UsageError, match="LLMFW_TRACE_HOOKS='yes' is neither 0 nor 1"):
        host(plugin_of())
