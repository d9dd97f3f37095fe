"""Is the plugin found by metadata alone, and does importing it stay light?"""

from __future__ import annotations

import re
import subprocess
import sys

from llmfw.errors import PluginError
from llmfw.plugins import Catalog, PluginEntry, find_local
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.subject import Subject

HEAVY = ("torch", "cupy", "cupyx")
_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit)\b")
_IMPORT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(name + " is not to be imported here")

sys.meta_path.insert(0, Refuse())
from llmfw.plugins import PluginEntry
PluginEntry("llmfw.models", {name!r}, {value!r}, {dist!r}, {version!r}).load()
"""


def entry_of(subject: Subject) -> PluginEntry:
    """The installed entry point that serves the architecture.

    Raises:
        CheckSkipped: If a file or script serves it instead.
    """
    if subject.distribution is None and find_local(subject.architecture) is not None:
        raise CheckSkipped(f"{subject.architecture} is registered by a file, not installed")
    try:
        return Catalog.scan().find(subject.architecture, subject.distribution)
    except PluginError as exc:
        raise CheckFailure(
            "the plugin is not found by its metadata: " + exc.message,
            expected=f"one entry point {subject.architecture} in the group llmfw.models",
            got="see above",
            look='pyproject.toml, [project.entry-points."llmfw.models"]; install it again after '
            "a change: pip install -e .",
        ) from exc


def discovered_by_metadata(subject: Subject) -> None:
    """An installed entry point serves the architecture, and it loads.

    Raises:
        CheckFailure: If none does, several do, or its hooks break the contract.
    """
    entry_of(subject)
    subject.host()


def imports_without_torch(subject: Subject) -> None:
    """The plugin's module imports where torch and CuPy cannot be imported.

    Raises:
        CheckFailure: Naming the import.
    """
    entry = entry_of(subject)
    code = _IMPORT.format(
        heavy=HEAVY, name=entry.name, value=entry.value, dist=entry.dist, version=entry.version
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # The first error is the original one, those after it tell whose plugin it is.
        first = next((n for n, line in enumerate(lines) if _ERROR.match(line)), len(lines) - 1)
        frames = [line.strip() for line in lines[:first] if line.strip().startswith("File")]
        raise CheckFailure(
            f"importing {entry.value} needs what is only there when a model is built",
            module=entry.value.partition(":")[0],
            expected="an import without " + ", ".join(HEAVY),
            got=lines[first] if lines else f"exit code {done.returncode}",
            look="\n".join([each for each in frames if "<string>" not in each][-3:])
            + "\nimport the model inside the hooks, annotations under TYPE_CHECKING",
        )
