"""The conformance kit and verify find every planted fault, and nothing in the sound plugins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contract_plugins import KINDS, planted
from llmfw.testing import Subject
from llmfw.testing.checks import CHECKS, run_checks
from llmfw.testing.verify import verify_tiny
from planted_faults import FAULTS

QUICK = [check for check in CHECKS if not check.slow and not check.gpu]
NEEDS_METADATA = {"discovered_by_metadata", "imports_without_torch"}
NUMBERS = {name: fault for name, fault in FAULTS.items() if fault.module is not None}


@pytest.fixture(scope="module")
def references() -> Iterator[dict[str, Subject]]:
    """A subject of each kind: its reference and checkpoint serve all faults of that kind."""
    subjects = {name: Subject(kind.architecture, kind.config) for name, kind in KINDS.items()}
    yield subjects
    for subject in subjects.values():
        subject.close()


@pytest.mark.parametrize("name", KINDS)
def test_sound_plugins_pass(name: str, references: dict[str, Subject]) -> None:
    kind = KINDS[name]
    with planted(kind, kind.plugin):
        subject = references[name].again()
        results = list(run_checks(subject, QUICK))
        report = verify_tiny(subject)
    assert [each for each in results if each.outcome == "failed"] == []
    skipped = {each.name for each in results if each.outcome == "skipped"}
    assert skipped == NEEDS_METADATA
    assert report.passed, list(report.rows())
    assert report.divergence is None


@pytest.mark.parametrize("name", FAULTS)
def test_the_right_check_catches_it(name: str, references: dict[str, Subject]) -> None:
    fault = FAULTS[name]
    kind = KINDS[fault.kind]
    with planted(kind, fault.plugin):
        results = run_checks(references[fault.kind].again(), QUICK)
        first = next((each for each in results if each.outcome == "failed"), None)
    assert first is not None, "no check failed"
    assert first.name == fault.check, first.detail
    for words in fault.words:
        assert words in first.detail, f"{words!r} is not in:\n{first.detail}"


@pytest.mark.parametrize("name", NUMBERS)
def test_verify_names_the_first_diverging_module(name: str, references: dict[str, Subject]) -> None:
    fault = NUMBERS[name]
    kind = KINDS[fault.kind]
    with planted(kind, fault.plugin):
        report = verify_tiny(references[fault.kind].again())
    assert not report.passed
    assert report.divergence is not None, list(report.rows())
    found = report.divergence
    assert (found.module, found.pair.stage) == (fault.module, fault.stage), found.where


def test_there_are_enough_kinds_of_faults() -> None:
    assert len(FAULTS) >= 12
    assert {fault.kind for fault in FAULTS.values()} == set(KINDS)
