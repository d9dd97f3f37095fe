"""The unrelated distribution on PyPI that is called `llmfw`.

It owns the same import package and the same console script as ours, so installing both leaves one
of them broken. Ours are `llmfw-core`, `llmfw-cli` and `llmfw-<family>`; none is called `llmfw`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from llmfw.errors import ForeignDistributionError

NAME = "llmfw"
CURE = (
    "remove it and repair ours: pip uninstall llmfw && "
    "pip install --force-reinstall --no-deps llmfw-core llmfw-cli\n"
    "our packages are called llmfw-core, llmfw-cli and llmfw-<family>"
)


@dataclass(frozen=True)
class ForeignDistribution:
    """What is known of the foreign distribution.

    Args:
        version: Its version.
        location: The folder it is installed in.
        hides_package: Whether `import llmfw` gives its code, at least in part, instead of ours.
        hides_script: Whether the command `llmfw` is its own instead of ours.
    """

    version: str
    location: Path
    hides_package: bool
    hides_script: bool

    @property
    def harm(self) -> str:
        """What it breaks, as the end of a sentence."""
        parts = ["the package `llmfw`"] * self.hides_package
        parts += ["the command `llmfw`"] * self.hides_script
        return (
            f"it hides {' and '.join(parts)} of ours" if parts else "it hides nothing of ours yet"
        )

    @property
    def message(self) -> str:
        """The fact, for people."""
        return (
            f"somebody else's distribution `llmfw` {self.version} (an LLM firewall) is installed"
            f" in {self.location}: {self.harm}"
        )

    def error(self) -> ForeignDistributionError:
        """The error that tells of it."""
        return ForeignDistributionError(
            self.message, hint=CURE, version=self.version, location=self.location
        )


def find_foreign(
    path: Sequence[str] | None = None, *, package: Path | None = None, scripts: Path | None = None
) -> ForeignDistribution | None:
    """Look for the foreign distribution; imports nothing of it.

    Args:
        path: Where distributions are looked for; None for `sys.path`.
        package: The `__init__.py` that `import llmfw` runs; found by itself when left out.
        scripts: The folder of console scripts; this interpreter's when left out.
    """
    dist = _distribution(path)
    if dist is None:
        return None
    return ForeignDistribution(
        version=dist.version,
        location=Path(str(dist.locate_file(""))),
        hides_package=_hides_package(dist, package or _package_file()),
        hides_script=_hides_script(scripts or Path(sysconfig.get_path("scripts"))),
    )


def check_foreign() -> None:
    """Refuse to go on where the foreign distribution hides ours.

    Raises:
        ForeignDistributionError: If it hides our package or our command.
    """
    found = find_foreign()
    if found is not None and (found.hides_package or found.hides_script):
        raise found.error()


def _distribution(path: Sequence[str] | None) -> metadata.Distribution | None:
    if path is None:
        found = metadata.distributions(name=NAME)
    else:
        found = metadata.distributions(name=NAME, path=list(path))
    return next(iter(found), None)


def _package_file() -> Path | None:
    spec = importlib.util.find_spec(NAME)
    return Path(spec.origin) if spec is not None and spec.origin else None


def _hides_package(dist: metadata.Distribution, package: Path | None) -> bool:
    """Whether `package` is the foreign distribution's file, by its recorded digest, not only by its
    place.

    Two wheels may have written the same file; the one installed last owns it.
    """
    if package is None or not package.is_file():
        return False
    for file in dist.files or ():
        if file.as_posix() == f"{NAME}/__init__.py":
            if Path(str(dist.locate_file(file))).resolve() != package.resolve():
                return False
            return file.hash is None or _recorded_digest(package) == file.hash.value
    return False


def _recorded_digest(file: Path) -> str:
    """The digest as RECORD writes it."""
    return urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()


def _hides_script(scripts: Path) -> bool:
    for name in (NAME, f"{NAME}.exe"):
        script = scripts / name
        if script.is_file():
            return b"llmfw_cli" not in script.read_bytes()
    return False
