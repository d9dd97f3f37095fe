from __future__ import annotations

import importlib
import resource
import subprocess
import sys

import pytest

import llmfw

HEAVY = "{'torch', 'transformers', 'numpy', 'pluggy', 'llmfw_llama', 'safetensors', 'gguf'}"


def run(code: str) -> float:
    """Processor seconds that a fresh interpreter takes for `code`; the best of three.

    A busy machine stretches the clock's time, and hardly the processor's.
    """
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        best = min(best, used)
    return best


def test_importing_llmfw_is_instant() -> None:
    assert run("import llmfw") - run("pass") < 0.1


def test_importing_llmfw_loads_nothing_heavy() -> None:
    run(f"import sys, llmfw; dir(llmfw); bad = {HEAVY} & set(sys.modules); assert not bad, bad")


def test_the_plugin_floor_loads_no_torch() -> None:
    run(
        "import sys, llmfw.plugins, llmfw.plugins.foreign\n"
        "heavy = {'torch', 'transformers', 'numpy', 'llmfw_llama'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_every_public_name_is_listed_once_and_has_a_home() -> None:
    assert len(llmfw.__all__) == len(set(llmfw.__all__))
    assert set(llmfw.__all__) == {*llmfw._MODULES, "__version__"}
    assert set(llmfw.__all__) <= set(dir(llmfw))


@pytest.mark.parametrize("name", llmfw.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    value = getattr(llmfw, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(llmfw._MODULES[name]), name)


def test_the_version_is_that_of_the_metadata() -> None:
    assert llmfw.__version__ == importlib.metadata.version("llmfw-core")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llmfw' has no attribute 'LLMM'"):
        _ = llmfw.LLMM
