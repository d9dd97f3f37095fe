"""Does the plugin's wheel build, and is the plugin found where only the wheel is installed?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

from llmfw.testing.checks.discovery import entry_of
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.subject import Subject

_LEFT_OUT = shutil.ignore_patterns(
    "build", "dist", "*.egg-info", "__pycache__", ".git", ".venv", "venv"
)
_FIND = """
import sys
from llmfw.plugins import Catalog
entries = Catalog.scan([{site!r}]).models[{name!r}]
plugin = entries[0].load()
module = sys.modules[entries[0].value.partition(":")[0]]
assert module.__file__.startswith({site!r}), module.__file__
"""


def source_of(distribution: str) -> Path:
    """The folder that an editable or local install came from.

    Raises:
        CheckSkipped: If it was installed from a wheel or an index.
    """
    text = metadata.distribution(distribution).read_text("direct_url.json") or "{}"
    url = json.loads(text).get("url", "")
    folder = Path(unquote(urlparse(url).path)) if url.startswith("file:") else None
    if folder is None or not (folder / "pyproject.toml").is_file():
        raise CheckSkipped(f"{distribution} was not installed from a source folder")
    return folder


def wheel_builds_and_installs(subject: Subject) -> None:
    """The wheel builds, installs into an empty folder, and the plugin is found and loads there.

    Raises:
        CheckFailure: With the last lines of the step that failed.
    """
    entry = entry_of(subject)
    if find_spec("pip") is None:
        raise CheckSkipped("this environment has no pip")
    source = source_of(entry.dist)
    wheels, site = subject.folder / "wheels", subject.folder / "site"
    copy = subject.folder / "source"  # building in place would leave its traces there
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=_LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    _run([*build, str(copy)], f"the wheel of {entry.dist} does not build", source)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    _run(install, f"{wheel.name} does not install", source)
    code = _FIND.format(site=str(site), name=entry.name)
    code = f"import sys\nsys.path.insert(0, {str(site)!r})\n{code}"
    _run([sys.executable, "-c", code], f"the plugin in {wheel.name} does not load", source)


def _run(command: Sequence[str], problem: str, source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise CheckFailure(
            problem,
            tensor=str(source),
            expected="exit code 0",
            got="\n".join([f"exit code {done.returncode}", *lines[-6:]]),
            look=f"{source / 'pyproject.toml'}: packages, package-data and entry points",
        )
