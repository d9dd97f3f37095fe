"""A directory in the making: whole or not at all, kept for the next, one process at a time."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from llmfw.errors import CheckpointError
from llmfw.weights.staging import JOURNAL, Staging, staging_path


def test_it_appears_by_commit_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, {"of": 1}) as staging:
        (staging.folder / "file").write_text("x")
        assert not out.exists()
        staging.commit()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert not staging_path(out).exists()


def test_what_is_done_is_known_to_the_next_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, {"of": (1, 2)}) as staging:
        staging.mark({"a": "1", "b": "2"})
        (staging.folder / "file").write_text("x")
    with Staging(out, {"of": (1, 2)}) as staging:
        assert staging.done == {"a": "1", "b": "2"}
        staging.mark({"c": "3"})
    with Staging(out, {"of": (1, 2)}) as staging:
        assert staging.done == {"a": "1", "b": "2", "c": "3"}
        assert (staging.folder / "file").is_file()


def test_work_of_another_kind_is_thrown_away_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with Staging(out, {"of": 1}) as staging:
        staging.mark({"a": "1"})
        (staging.folder / "folder").mkdir()
        (staging.folder / "folder" / "file").write_text("x")
    with caplog.at_level(logging.WARNING, "llmfw.weights"), Staging(out, {"of": 2}) as staging:
        assert staging.done == {}
        assert not (staging.folder / "folder").exists()
    assert "thrown away" in caplog.text


def test_an_entry_that_was_cut_ends_the_journal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, {"of": 1}) as staging:
        staging.mark({"a": "1"})
        staging.mark({"b": "2"})
    journal = staging_path(out) / JOURNAL
    journal.write_text(journal.read_text()[:-5])
    with Staging(out, {"of": 1}) as staging:
        assert staging.done == {"a": "1"}
        staging.mark({"c": "3"})
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [entry.get("done") for entry in entries] == [None, "a", "c"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, {"of": 1}):
        with pytest.raises(CheckpointError, match="another process is making it right now"):
            Staging(out, {"of": 1})
    with Staging(out, {"of": 1}):
        pass


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_written_over(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
        (out / "mine").write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is there already"):
        Staging(out, {})


def test_something_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, {}) as staging:
        out.mkdir()
        (out / "theirs").write_text("x")
        with pytest.raises(CheckpointError, match="is there already"):
            staging.commit()
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Staging(out, {}) as staging:
        (staging.folder / "file").write_text("x")
        staging.commit()
    assert os.listdir(out) == ["file"]
