from __future__ import annotations

from pathlib import Path

import pytest

from llmfw.errors import PluginIncompatibleError
from llmfw.plugins import Catalog
from llmfw.plugins.compat import check_compatible, misfits
from llmfw.plugins.resolve import resolve_plugin
from plugin_fakes import check_golden, model_dist, write_dist


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_dist(tmp_path, "llmfw-core", "0.1.3")
    write_dist(tmp_path, "transformers", "5.4.0rc1")
    write_dist(tmp_path, "torch", "2.9.0+cpu")
    write_dist(
        tmp_path,
        "with-extra",
        "1.0",
        requires=("torch>=3", 'missing-thing>=2; extra == "fast"', 'torch>=2; extra == "fast"'),
    )
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "llmfw-core>=0.1,<0.2",
        "LLMFW.Core",
        "transformers>=5.3",
        "torch>=2.9",
        "absent>=1; python_version < '3'",
        "absent; extra == 'cuda12'",
        "with-extra",
    ],
)
def test_requirements_that_are_met(site: Path, line: str) -> None:
    assert misfits([line], [str(site)]) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("llmfw-core>=0.2", "requires llmfw-core>=0.2, installed is 0.1.3"),
        (
            "transformers<5; python_version >= '3'",
            "requires transformers<5, installed is 5.4.0rc1",
        ),
        ("absent~=1.0", "requires absent~=1.0, which is not installed"),
        ("with-extra[fast]", "requires missing-thing>=2, which is not installed"),
    ],
)
def test_requirements_that_are_not(site: Path, line: str, reason: str) -> None:
    assert [misfit.reason for misfit in misfits([line], [str(site)])] == [reason]


def test_a_line_that_cannot_be_read_is_told(site: Path) -> None:
    (misfit,) = misfits(["llmfw-core >>= 1"], [str(site)])
    assert misfit.reason.startswith("requires 'llmfw-core >>= 1', which cannot be read: ")


def test_the_error_lists_every_misfit_before_any_import(site: Path) -> None:
    model_dist(
        site,
        "llmfw-old",
        "OldForCausalLM",
        requires=("llmfw-core>=0.3,<0.4", "torch>=2.6", "absent>=1"),
        code="raise SystemExit('imported')\n",
    )
    catalog = Catalog.scan([str(site)])
    with pytest.raises(PluginIncompatibleError) as caught:
        resolve_plugin("OldForCausalLM", catalog=catalog)
    check_golden("incompatible", caught.value)


def test_a_fitting_plugin_passes(site: Path) -> None:
    model_dist(site, "llmfw-new", "NewForCausalLM", requires=("llmfw-core>=0.1,<0.2",))
    catalog = Catalog.scan([str(site)])
    check_compatible(catalog.find("NewForCausalLM"), catalog.path)
