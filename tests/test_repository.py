"""The rules of the house that a program can check: what lies where, and how long it may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import line_count
import module_map

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "LICENSE",
    "Makefile",
    "README.md",
    "builtin_models",
    "cli",
    "core",
    "docs",
    "plugin_template",
    "pyproject.toml",
    "tests",
}
FAMILIES = sorted(path.parent for path in ROOT.glob("builtin_models/*/pyproject.toml"))
FALLBACK = ROOT / "builtin_models/transformers"  # it serves what has no family: files of its own
PACKAGES = [ROOT / "core", ROOT / "cli", *FAMILIES]
SOURCES = sorted(path for package in PACKAGES for path in package.glob("src/**/*.py"))
CORE_SOURCES = [path for path in SOURCES if path.is_relative_to(ROOT / "core")]

# GGUF files speak of architectures by name, so the tables of that format have to, too.
MAY_NAME_MODELS = {"core/src/llmfw/weights/gguf_tables.py"}
# `llama3` is a kind of rope scaling in the format of config.json, gpt_neox a layout of rotary
# features, llama.cpp a project: these are not models.
MODEL_NAME = re.compile(
    r"(?<![a-z])(llama(?!3\b|\.cpp\b|-gguf-)|smollm|mistral|mixtral|qwen|gemma|deepseek|falcon"
    r"|gpt.?oss|gpt.?2|phi.?[1-9]|olmo|granite|starcoder|stablelm|nemotron|exaone|internlm|baichuan)",
    re.IGNORECASE,
)

FAMILY_FILES = {
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "src/PACKAGE/__init__.py",
    "src/PACKAGE/modeling.py",
    "src/PACKAGE/py.typed",
    "src/PACKAGE/weights.py",
    "tests/test_contract.py",
}
# What a family may have besides: a configuration that transformers lacks, kernels, demo weights.
FAMILY_MAY_HAVE = re.compile(
    r"src/PACKAGE/(configuration\.py|demo\.py|kernels/.*)|tests/test_\w+\.py"
)
MOST_LINES = {"llama": 120, "opt": 110, "deepseek": 300, "mamba": 300, "transformers": 900}
MOST_LINES_OF_OTHERS = 60


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files(*folders: str) -> list[str]:
    """Files that git tracks; skips where the tests run from an unpacked archive."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def count_lines(paths: list[Path]) -> dict[str, int]:
    return {relative(path): len(path.read_text("utf-8").splitlines()) for path in paths}


def manifest(package: Path) -> dict[str, Any]:
    return tomllib.loads((package / "pyproject.toml").read_text("utf-8"))


def ids(path: Path) -> str:
    return relative(path)


def test_top_level_holds_only_what_the_design_names() -> None:
    names = {name.split("/")[0] for name in tracked_files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_core_names_no_model() -> None:
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in CORE_SOURCES
        if relative(path) not in MAY_NAME_MODELS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if MODEL_NAME.search(line)
    ]
    assert not found, "core knows no model by name:\n" + "\n".join(found)


def test_the_search_for_model_names_finds_them() -> None:
    for text in ("LlamaForCausalLM", "class Qwen3Config", "as in Gemma", "# DeepSeek"):
        assert MODEL_NAME.search(text), text
    for text in ('rope_type == "llama3"', "as llama.cpp stores it", "graphics", "philosophy"):
        assert not MODEL_NAME.search(text), text


def test_no_source_file_is_longer_than_500_lines() -> None:
    tests = [ROOT / name for name in tracked_files("tests") if name.endswith(".py")]
    lengths = count_lines(SOURCES + tests)
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_most_source_files_are_shorter_than_300_lines() -> None:
    lengths = count_lines(SOURCES)
    long = {name: lines for name, lines in lengths.items() if lines >= 300}
    assert len(long) <= len(lengths) / 10, long


def test_sources_are_ascii() -> None:
    assert [relative(path) for path in SOURCES if not path.read_text("utf-8").isascii()] == []


@pytest.mark.parametrize("package", PACKAGES, ids=ids)
def test_every_package_has_its_papers(package: Path) -> None:
    facts = manifest(package)
    (source,) = package.glob("src/*/__init__.py")
    assert (source.parent / "py.typed").exists()
    assert (package / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")
    assert len((package / "README.md").read_text("utf-8").split()) > 20
    assert facts["project"]["license"] == "Apache-2.0"
    assert facts["project"]["version"] == manifest(ROOT / "core")["project"]["version"]
    assert "torch" not in " ".join(facts["build-system"]["requires"])


@pytest.mark.parametrize("package", PACKAGES, ids=ids)
def test_what_is_imported_is_declared(package: Path) -> None:
    """No package lives on what another one happens to install."""
    project = manifest(package)["project"]
    groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    declared = [requirement for group in groups for requirement in group]
    names = {re.split(r"[^\w.-]", requirement)[0].replace("-", "_") for requirement in declared}
    names = {re.sub(r"^(cupy)_cuda\d+x$|^(flashinfer)_python$", r"\1\2", name) for name in names}
    own = {path.name for path in package.glob("src/*")} | {"llmfw"}
    imported = {
        name.split(".")[0]
        for path in SOURCES
        if path.is_relative_to(package)
        for name in imports_of(path)
    }
    assert imported - names - own - sys.stdlib_module_names == set()


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def test_the_licence_names_its_holder() -> None:
    assert "Copyright 2026 The llmfw authors" in (ROOT / "LICENSE").read_text("utf-8")


def test_the_workspace_cannot_be_published() -> None:
    project = manifest(ROOT)["project"]
    assert project["name"] == "llmfw-workspace"
    assert "Private :: Do Not Upload" in project["classifiers"]


@pytest.mark.parametrize("family", FAMILIES, ids=ids)
def test_every_family_has_the_same_files(family: Path) -> None:
    (package,) = (path.parent.name for path in family.glob("src/*/__init__.py"))
    names = {
        name.removeprefix(f"{relative(family)}/").replace(f"src/{package}/", "src/PACKAGE/")
        for name in tracked_files(relative(family))
    }
    assert names >= FAMILY_FILES
    if family == FALLBACK:
        return
    assert [name for name in names - FAMILY_FILES if not FAMILY_MAY_HAVE.fullmatch(name)] == []


@pytest.mark.parametrize("family", FAMILIES, ids=ids)
def test_a_family_stays_short(family: Path) -> None:
    counts = line_count.count_folder(family / "src")
    print(line_count.table([family / "src"]))
    assert sum(counts.values()) <= MOST_LINES.get(family.name, MOST_LINES_OF_OTHERS), counts


def test_the_line_counter_counts_code_only() -> None:
    source = (
        '"""Docstring\n\nof three lines."""\n\nimport os  # counts\n\n# does not\n\n\n'
        'def f(x):\n    "doc"\n    text = """two\n\n    lines"""\n    return (\n        x\n    )\n'
    )
    # import, def, the two non-blank lines of `text`, and `return x` once formatted
    assert line_count.count_source(line_count.formatted(source)) == 5


def test_import_linter_watches_every_package() -> None:
    settings = manifest(ROOT)["tool"]["importlinter"]
    families = {path.name for family in FAMILIES for path in family.glob("src/*") if path.is_dir()}
    families = {name for name in families if not name.endswith(".egg-info")}
    assert set(settings["root_packages"]) == {"llmfw", "llmfw_cli"} | families
    by_name = {contract["name"]: contract for contract in settings["contracts"]}
    for name, key in {
        "Core knows neither the command line nor a model family": "forbidden_modules",
        "The command line knows no model family": "forbidden_modules",
        "A family knows neither the engine nor the command line": "source_modules",
        "Families do not know each other": "modules",
        "CuPy is imported in llmfw.kernels.cupy only": "source_modules",
    }.items():
        assert families <= set(by_name[name][key]), name


def test_the_map_of_modules_is_current() -> None:
    without = [relative(path) for path in module_map.modules() if not module_map.summary(path)]
    assert without == [], "a module's docstring begins with one sentence that says what it is"
    assert module_map.current() == module_map.render(), "run: python tests/module_map.py"


def test_nobody_is_told_to_install_somebody_elses_llmfw() -> None:
    """`llmfw` on PyPI is another project; ours are llmfw-core, llmfw-cli and so on."""
    wrong = re.compile(r"(pip|uv add|uv tool|pipx)\s+install\s+(-\S+\s+)*[\"']?llmfw(?![-\w/])")
    found = [
        name
        for name in tracked_files()
        if name.endswith((".md", ".py", ".toml", "Makefile"))
        and name != "tests/test_repository.py"
        and wrong.search((ROOT / name).read_text("utf-8"))
    ]
    assert found == []
    assert wrong.search("pip install -U llmfw")
    assert not wrong.search("pip install llmfw-cli")
