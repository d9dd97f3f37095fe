"""Opening a model without garbage collections."""

from __future__ import annotations

import gc

import pytest

from llmfw_cli.garbage import nothing_collected


def test_collections_are_off_meanwhile_and_what_lives_is_spared():
    collected = []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(info["generation"])

    gc.unfreeze()
    gc.callbacks.append(note)
    try:
        with nothing_collected():
            kept = [[index] for index in range(200_000)]
        during = len(collected)
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(kept)
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    assert during == 0


def test_a_failure_turns_them_on_again():
    gc.unfreeze()
    with pytest.raises(ValueError, match="broken"), nothing_collected():
        raise ValueError("broken")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
