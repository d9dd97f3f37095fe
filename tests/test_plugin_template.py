"""plugin_template: cookiecutter and `llmfw new` render one tree, which works before any edit."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run
from llmfw_cli.new.answers import check
from llmfw_cli.new.render import TEMPLATE, render
from test_repository import FAMILY_FILES

ROOT = Path(__file__).resolve().parent.parent
CHOICES = list(itertools.product(("decoder", "blank"), ("transformers", "own")))


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rendered(folder: Path, base: str, config: str) -> Path:
    answers = {"model_name": "Tiny Zebra", "base": base, "config": config}
    return render(check(answers), folder)


def command(folder: Path, *arguments: str | Path, **more: Any) -> str:
    """Run a Python program in a folder; its output, which is shown when it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("base", "config"), CHOICES)
def test_cookiecutter_renders_the_same(tmp_path: Path, base: str, config: str) -> None:
    ours = files_of(rendered(tmp_path / "ours", base, config))
    answers = ("model_name=Tiny Zebra", f"base={base}", f"config={config}")
    command(
        tmp_path, "-m", "cookiecutter", ROOT, *answers, "--directory", "plugin_template",
        "--no-input", "--output-dir", tmp_path / "theirs",
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert files_of(tmp_path / "theirs" / "tiny-zebra-plugin") == ours
    assert "{{" not in "".join(ours.values()).replace("${{", "")


@pytest.mark.parametrize(("base", "config"), CHOICES)
def test_what_is_rendered_is_well_formed(tmp_path: Path, base: str, config: str) -> None:
    plugin = rendered(tmp_path, base, config)
    command(plugin, "-m", "ruff", "check", "--select", "E,F,I,B,UP,SIM,RUF100", ".")
    command(plugin, "-m", "ruff", "format", "--check", ".")


def test_a_rendered_package_has_the_files_of_a_built_in_one(tmp_path: Path) -> None:
    plugin = rendered(tmp_path, "decoder", "transformers")
    names = {name.replace("tiny_zebra_plugin", "PACKAGE") for name in files_of(plugin)}
    alone = {
        ".gitignore",
        ".github/workflows/ci.yml",
        "CHANGELOG.md",
        "tests/test_contract.py",
        "tests/test_discovery.py",
    }
    assert names == FAMILY_FILES | alone
    own = set(files_of(rendered(tmp_path / "own", "decoder", "own")))
    assert "src/tiny_zebra_plugin/configuration.py" in own
    assert len(own) == len(names) + 1


@pytest.mark.parametrize("base", ["decoder", "blank"])
def test_a_rendered_package_pins_what_the_built_in_ones_pin(tmp_path: Path, base: str) -> None:
    plugin = rendered(tmp_path, base, "transformers")
    facts = tomllib.loads((plugin / "pyproject.toml").read_text("utf-8"))
    pins = set(facts["project"]["dependencies"])
    for path in sorted(ROOT.glob("builtin_models/*/pyproject.toml")):
        family = tomllib.loads(path.read_text("utf-8"))
        if "*" in family["project"]["entry-points"]["llmfw.models"]:
            continue  # a fallback lives on more of transformers than a family does
        theirs = set(family["project"]["dependencies"])
        of_its_kind = any(pin.startswith("torch") for pin in theirs) == (base == "blank")
        assert pins == theirs or not of_its_kind, path
        assert facts["build-system"] == family["build-system"]
        assert facts["project"]["requires-python"] == family["project"]["requires-python"]
        assert facts["tool"]["setuptools"] == family["tool"]["setuptools"]


def test_there_is_one_template() -> None:
    assert TEMPLATE.resolve() == ROOT / "plugin_template"
    assert (ROOT / "cli" / "src" / "llmfw_cli" / "template").is_symlink()


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    first = run("new", "Zebra", "--output", str(tmp_path))
    assert first.exit_code == 0, first.output
    again = run("new", "Zebra", "--output", str(tmp_path))
    assert again.exit_code == 2
    assert "zebra-plugin exists already" in again.output


def install(plugin: Path, site: Path) -> dict[str, str]:
    """Install a plugin into a folder of its own; the environment that has it on its path."""
    command(
        plugin, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
        "--target", site, ".",
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "config"), CHOICES)
def test_it_installs_and_passes_its_own_tests(tmp_path: Path, base: str, config: str) -> None:
    plugin = rendered(tmp_path, base, config)
    environment = install(plugin, tmp_path / "site")
    chosen = ("-m", "not slow and not gpu", "-p", "no:cacheprovider")
    told = command(plugin, "-m", "pytest", "-q", *chosen, env=environment)
    assert " passed" in told
    assert "failed" not in told
    command(plugin, "-m", "mypy", env=environment)


@pytest.mark.slow
def test_the_wheel_of_the_command_line_has_the_template(tmp_path: Path) -> None:
    left = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT / "cli", tmp_path / "cli", ignore=left)
    command(source, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"llmfw_cli/template/{name}" for name in files_of(TEMPLATE)} <= names
