"""What is kept: the user's own files before ready-made ones, and a note of what was used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmfw import cache


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_ready_made", {})
    monkeypatch.setattr(cache, "_used", {})


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_the_users_own_file_comes_first(tmp_path: Path) -> None:
    ready = written(tmp_path / "engine" / "a")
    cache.add_ready_made({"kernels/a": ready})
    assert cache.find("kernels/a") == ready
    own = written(cache.cache_dir() / "kernels" / "a")
    assert cache.find("kernels/a") == own
    assert cache.find("kernels/b") is None


def test_what_was_used_is_known(tmp_path: Path) -> None:
    assert cache.used() == {}
    own = written(cache.cache_dir() / "kernels" / "a")
    cache.find("kernels/a")
    cache.find("kernels/b")
    cache.note_used("kernels/c", tmp_path)
    assert cache.used() == {"kernels/a": own, "kernels/c": tmp_path}


def test_ready_made_files_by_the_beginning_of_their_names(tmp_path: Path) -> None:
    cache.add_ready_made({"kernels/cpu/a-1": tmp_path, "kernels/cpu/b-1": tmp_path})
    assert list(cache.find_ready_made("kernels/cpu/a-")) == ["kernels/cpu/a-1"]


def test_a_cache_that_may_not_be_entered_is_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = written(tmp_path / "engine" / "a")
    cache.add_ready_made({"kernels/a": ready})
    real = os.stat

    def refuse(path: object, *more: object, **options: object) -> os.stat_result:
        if str(path).startswith(str(cache.cache_dir())):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", refuse)
    assert cache.find("kernels/a") == ready
    assert cache.find("kernels/b") is None
