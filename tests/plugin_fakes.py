"""Fake distributions and golden error texts, for tests of plugins and of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llmfw.errors import LlmfwError

GOLDEN = Path(__file__).parent / "golden"


def write_dist(
    folder: Path,
    name: str,
    version: str = "0.1.0",
    *,
    entry_points: Mapping[str, Mapping[str, str]] | None = None,
    requires: tuple[str, ...] = (),
    code: str | None = None,
) -> Path:
    """Write a distribution's dist-info as an installer would, and its module from `code`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n\n", "utf-8")
    text = ""
    for group, points in (entry_points or {}).items():
        text += f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
    if text:
        (info / "entry_points.txt").write_text(text, "utf-8")
    if code is not None:
        (folder / f"{name.replace('-', '_')}.py").write_text(code, "utf-8")
    return info


def model_dist(folder: Path, name: str, *architectures: str, **more: object) -> Path:
    """A distribution whose module `plugin` object serves `architectures`."""
    module = name.replace("-", "_")
    points = dict.fromkeys(architectures, f"{module}:plugin")
    return write_dist(folder, name, entry_points={"llmfw.models": points}, **more)  # type: ignore[arg-type]


def check_golden(name: str, error: LlmfwError, **replace: object) -> None:
    """Hold an error's class, exit code and text against `golden/errors/<name>.txt`.

    Run with WRITE_GOLDEN=1 after a deliberate change, and read the difference.

    Args:
        name: The golden file's name.
        error: The error.
        replace: Values that differ from run to run (folders), each written as {NAME} in the file.
    """
    text = str(error)
    for key, value in replace.items():
        text = text.replace(str(value), "{" + key + "}")
    found = f"{type(error).__name__}, exit code {error.exit_code}\n{text}\n"
    path = GOLDEN / "errors" / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, "utf-8")
    assert found == path.read_text("utf-8")
