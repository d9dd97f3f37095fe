"""Python's garbage collector while a model is opened: it would look often and find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No collection meanwhile; what lives at the end is left out of later ones (`gc.unfreeze`).

    Imports and loading make some hundred thousand objects that stay. Going through them again and
    again takes a tenth of a start, and later every full collection would stop the engine for 0.1 s
    and more.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
