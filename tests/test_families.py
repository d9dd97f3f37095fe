"""docs/families.md and the tests of families: every built-in architecture is in all of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import line_count
from published_layouts import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/families.md").read_text("utf-8")
FAMILIES = {
    path.parent.name: tomllib.loads(path.read_text("utf-8"))["project"]
    for path in sorted(ROOT.glob("builtin_models/*/pyproject.toml"))
}


def architectures_of(family: str) -> set[str]:
    """What its entry points name; a fallback names none."""
    return set(FAMILIES[family]["entry-points"]["llmfw.models"]) - {"*"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_lists_it_with_its_lines(family: str):
    (row,) = re.findall(rf"^\| `llmfw-{family}` \|.*$", PAGE, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert set(re.findall(r"`(\w+)`", cells[1])) == architectures_of(family)
    lines = line_count.count_folder(ROOT / "builtin_models" / family / "src")
    assert int(cells[-1]) == sum(lines.values()), "run: python tests/line_count.py"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"transformers"}))
def test_its_lines_stand_beside_those_of_other_engines(family: str):
    (row,) = re.findall(rf"^\| {family} \|.*$", PAGE, re.MULTILINE)
    lines = line_count.count_folder(ROOT / "builtin_models" / family / "src")
    assert int(row.split("|")[2]) == sum(lines.values()), "run: python tests/line_count.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_architecture_has_its_tests(family: str):
    parity = (ROOT / f"tests/test_against_hf_{family}.py").read_text("utf-8")
    contract = (ROOT / f"builtin_models/{family}/tests/test_contract.py").read_text("utf-8")
    for architecture in architectures_of(family):
        assert f'"{architecture}"' in parity, "a parity test with transformers"
        assert architecture in LAYOUTS, "its published names, in tests/published_layouts.py"
        if architecture != "Gemma3ForConditionalGeneration":  # its text part is Gemma3ForCausalLM's
            assert f'"{architecture}"' in contract, "the model contract"
