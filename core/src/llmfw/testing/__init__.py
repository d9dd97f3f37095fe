"""What model authors test with: a packed driver without a scheduler."""

from llmfw.testing.packed import PackedSession

__all__ = ["PackedSession"]
