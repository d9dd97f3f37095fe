from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from llmfw.errors import ForeignDistributionError
from llmfw.plugins import foreign
from llmfw.plugins.foreign import check_foreign, find_foreign
from plugin_fakes import check_golden, write_dist

THEIRS = b"# llmfw/__init__.py of somebody else\n"


def install_foreign(site: Path, *, digest: bool = True) -> Path:
    """What pip writes for the foreign distribution; returns its `__init__.py`."""
    info = write_dist(
        site, "llmfw", "0.1.1", entry_points={"console_scripts": {"llmfw": "llmfw.cli.main:main"}}
    )
    package = site / "llmfw" / "__init__.py"
    package.parent.mkdir()
    package.write_bytes(THEIRS)
    value = base64.urlsafe_b64encode(hashlib.sha256(THEIRS).digest()).rstrip(b"=").decode()
    hashed = f"sha256={value},{len(THEIRS)}" if digest else ","
    (info / "RECORD").write_text(f"llmfw/__init__.py,{hashed}\n", "utf-8")
    return package


def script(folder: Path, module: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "llmfw").write_text(f"#!python\nfrom {module} import main\nmain()\n", "utf-8")
    return folder


def test_there_is_none_without_it(tmp_path: Path) -> None:
    write_dist(tmp_path, "llmfw-core", "0.1.0")
    assert find_foreign([str(tmp_path)]) is None


@pytest.mark.parametrize("digest", [True, False])
def test_it_hides_our_package_and_our_command(tmp_path: Path, digest: bool) -> None:
    package = install_foreign(tmp_path, digest=digest)
    scripts = script(tmp_path / "bin", "llmfw.cli.main")
    found = find_foreign([str(tmp_path)], package=package, scripts=scripts)
    assert found is not None
    assert (found.hides_package, found.hides_script) == (True, True)
    check_golden("foreign_distribution", found.error(), folder=tmp_path)


def test_it_hides_nothing_where_ours_was_installed_later(tmp_path: Path) -> None:
    package = install_foreign(tmp_path)
    package.write_text("# ours, written over it\n")
    scripts = script(tmp_path / "bin", "llmfw_cli.app")
    found = find_foreign([str(tmp_path)], package=package, scripts=scripts)
    assert found is not None
    assert (found.hides_package, found.hides_script) == (False, False)
    assert "hides nothing of ours yet" in found.message


def test_it_hides_nothing_where_ours_comes_first_on_the_path(tmp_path: Path) -> None:
    install_foreign(tmp_path)
    found = find_foreign([str(tmp_path)], scripts=tmp_path)
    assert found is not None
    assert not found.hides_package, "this process imports ours"


def test_check_raises_where_it_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_foreign()
    install_foreign(tmp_path)
    scripts = script(tmp_path / "bin", "llmfw.cli.main")
    harmful = find_foreign([str(tmp_path)], scripts=scripts)
    monkeypatch.setattr(foreign, "find_foreign", lambda: harmful)
    with pytest.raises(ForeignDistributionError, match="hides the command `llmfw` of ours"):
        check_foreign()
