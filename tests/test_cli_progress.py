"""The progress bar tells what is done before there is something to count, and no log line shows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from rich.progress import Progress as Bars

from llmfw_cli import logs, output

logger = logging.getLogger("llmfw.kernels.cupy")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    kept = logging.getLogger("llmfw")
    level, handlers = kept.level, list(kept.handlers)
    yield
    kept.setLevel(level)
    kept.handlers = handlers


@pytest.mark.parametrize("level", logs.Level)
def test_what_happens_is_told_whatever_is_logged(
    level: logs.Level, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up(level, debug=False, quiet=False)
    told: list[str] = []
    with logs.told_to(told.append):
        logger.info("compiled %s", "norm.cu")
        logger.debug("a detail")
    logger.info("compiled nothing")
    assert told == ["compiled norm.cu"]
    printed = capsys.readouterr().err
    shows = level in (logs.Level.debug, logs.Level.info)
    assert ("llmfw: info: compiled norm.cu" in printed) == shows
    assert ("compiled nothing" in printed) == shows
    assert ("a detail" in printed) == (level is logs.Level.debug)
    assert logging.getLogger("llmfw").level == getattr(logging, level.value.upper())


def test_a_logger_with_a_level_of_its_own_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLMFW_TRACE_HOOKS lowers the level of one logger."""
    logs.set_up(logs.Level.warning, debug=False, quiet=False)
    trace = logging.getLogger("llmfw.plugins.trace.of_a_test")
    monkeypatch.setattr(trace, "level", logging.INFO)
    trace.info("a hook was called")
    assert capsys.readouterr().err == "llmfw: info: a hook was called\n"


def test_the_bar_has_it_as_its_title_until_something_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles: list[str] = []
    update = Bars.update

    def noted(self: Bars, task: object, **changes: object) -> None:
        titles.append(str(changes["description"]))
        update(self, task, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr(Bars, "update", noted)
    monkeypatch.setattr(output, "shows_progress", lambda: True)
    with output.progress("loading") as advance:
        logger.info("compiled %s [bold] in %d s", "norm.cu", 1)
        logger.info("x" * 200)
        assert advance is not None
        advance(1, 2, "a weight")
    logger.info("later")
    assert titles[0] == r"loading: compiled norm.cu \[bold] in 1 s"
    assert titles[1:] == [("loading: " + "x" * 200)[: output.TOLD], "loading"]


def test_nothing_is_listened_to_where_no_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "shows_progress", lambda: False)
    before = list(logging.getLogger("llmfw").handlers)
    with output.progress("loading") as advance:
        assert advance is None
        assert logging.getLogger("llmfw").handlers == before
