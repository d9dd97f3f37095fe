"""What model authors test with: the conformance kit, a pytest plugin and a packed driver.

    from llmfw.testing import ModelContract

Names are imported on first use: pytest loads `llmfw.testing.plugin` in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfw.testing.contract import ModelContract
    from llmfw.testing.failure import CheckFailure, CheckSkipped
    from llmfw.testing.packed import PackedSession
    from llmfw.testing.subject import Subject

__all__ = ["ModelContract", "PackedSession", "Subject", "CheckFailure", "CheckSkipped"]

_MODULES = {
    "ModelContract": "llmfw.testing.contract",
    "PackedSession": "llmfw.testing.packed",
    "Subject": "llmfw.testing.subject",
    "CheckFailure": "llmfw.testing.failure",
    "CheckSkipped": "llmfw.testing.failure",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'llmfw.testing' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
