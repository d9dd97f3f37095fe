"""Fallbacks: the plugin named `*` serves what no other plugin owns."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfw.errors import PluginConflictError, UnknownArchitectureError, UsageError
from llmfw.plugins import Catalog, load_reference, reference_to, resolve_plugin
from plugin_fakes import check_golden, model_dist


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    model_dist(tmp_path, "choose-foo", "FooForCausalLM", code="plugin = 'foo'\n")
    model_dist(tmp_path, "choose-any", "*", code="plugin = 'any'\n")
    return tmp_path


def scan(site: Path) -> Catalog:
    return Catalog.scan([str(site)])


def test_a_fallback_serves_what_no_plugin_owns(site: Path):
    assert resolve_plugin("FooForCausalLM", catalog=scan(site)).plugin == "foo"
    resolved = resolve_plugin("BarForCausalLM", catalog=scan(site))
    assert resolved.plugin == "any"
    assert resolved.entry is not None
    assert resolved.entry.is_fallback
    again = load_reference(reference_to(resolved), scan(site))
    assert again.plugin == "any"


def test_it_serves_an_owned_one_where_it_is_asked_for(site: Path, monkeypatch: pytest.MonkeyPatch):
    asked = resolve_plugin("FooForCausalLM", prefer="choose-any", catalog=scan(site))
    assert asked.plugin == "any"
    monkeypatch.setenv("LLMFW_DISABLE_PLUGINS", "choose-foo")
    assert resolve_plugin("FooForCausalLM", catalog=scan(site)).plugin == "any"


def test_it_is_no_architecture_of_its_own(site: Path):
    assert scan(site).owners("*") == ()


def test_switched_off(site: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnknownArchitectureError) as caught:
        resolve_plugin("BarForCausalLM", catalog=scan(site), fallback=False)
    check_golden("fallback_off", caught.value)
    monkeypatch.setenv("LLMFW_NO_FALLBACK", "1")
    with pytest.raises(UnknownArchitectureError, match="switched off by LLMFW_NO_FALLBACK"):
        resolve_plugin("BarForCausalLM", catalog=scan(site))
    with pytest.raises(UnknownArchitectureError, match="does not serve the architecture"):
        resolve_plugin("BarForCausalLM", prefer="choose-any", catalog=scan(site))
    monkeypatch.setenv("LLMFW_NO_FALLBACK", "yes")
    with pytest.raises(UsageError, match="neither 0 nor 1"):
        resolve_plugin("BarForCausalLM", catalog=scan(site))


def test_two_fallbacks(site: Path, monkeypatch: pytest.MonkeyPatch):
    model_dist(site, "choose-other", "*", code="plugin = 'other'\n")
    with pytest.raises(PluginConflictError) as caught:
        resolve_plugin("BarForCausalLM", catalog=scan(site))
    check_golden("fallback_conflict", caught.value)
    assert resolve_plugin("FooForCausalLM", catalog=scan(site)).plugin == "foo"
    monkeypatch.setenv("LLMFW_PREFER", "choose-other")
    assert resolve_plugin("BarForCausalLM", catalog=scan(site)).plugin == "other"


def test_demanded_of_a_plugin_that_serves_others(site: Path):
    with pytest.raises(UnknownArchitectureError) as caught:
        resolve_plugin("BarForCausalLM", prefer="choose-foo", catalog=scan(site))
    assert "it serves: FooForCausalLM" in str(caught.value)
