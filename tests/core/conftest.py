"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from engine_models import HistoryModel, make_engine


@pytest.fixture
def engines():
    made = []

    def make(model=None, **settings):
        engine = make_engine(model or HistoryModel(), **settings)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown()
