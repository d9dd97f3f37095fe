"""docs/plugins/tutorial.md, typed in as it stands, in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from test_docs import BLOCK

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plugins" / "tutorial.md"
NAMED = re.compile(r"# (?P<path>[\w/.-]+\.py)\n")
SEEN = ("NOT RIGHT YET", "smollm3-plugin  0.1.0", "first diverging", " passed")

pytestmark = pytest.mark.slow


def environment(folder: Path) -> dict[str, str]:
    """A virtual environment that sees this one's packages, editable ones too, and none of ours."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({here!r})\n", "utf-8")
    for name, module in {"llmfw": "llmfw_cli", "pip": "pip", "pytest": "pytest"}.items():
        script = venv / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {venv}/bin/python -m {module} "$@"\n', "utf-8")
        script.chmod(0o755)
    left = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **left,
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way of saying: without isolation
        "PIP_NO_INDEX": "1",
        "PYTHONWARNINGS": "ignore",
    }


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    told: list[str] = []
    for block in BLOCK.finditer(PAGE.read_text("utf-8")):
        text, language = block["text"], block["language"]
        named = NAMED.match(text)
        if language == "python" and named:
            (tmp_path / named["path"]).write_text(text[named.end() :], "utf-8")
            continue
        if language not in ("python", "bash"):
            continue
        command = ["bash", "-ec", text] if language == "bash" else ["python", "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        if text.startswith("llmfw run"):
            assert done.stdout.strip(), f"{text} printed no answer\n{done.stderr}"
        told.append(done.stdout)
    everything = "\n".join(told)
    assert [words for words in SEEN if words not in everything] == [], everything


def test_what_the_tutorial_shows_is_what_is_printed(tmp_path: Path) -> None:
    page = PAGE.read_text("utf-8")
    blocks = list(BLOCK.finditer(page))
    shown = next(block["text"] for block in blocks if block["language"] == "text")
    make = next(block["text"] for block in blocks if block["language"] == "python")
    variables = environment(tmp_path)
    run = {"cwd": tmp_path, "env": variables, "capture_output": True, "text": True, "check": True}
    subprocess.run(["python", "-c", make], **run)
    done = subprocess.run(["llmfw", "new", "--from", "smollm3-tiny"], **run)
    number = re.compile(r"\d\.\de[+-]\d\d")
    assert number.sub("N", done.stdout) == number.sub("N", shown)
