"""The two models that are compared, and keeping only one of them in memory."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from llmfw.llm import LLM
from llmfw.testing.trace import Recording, record_ours

Steps = Sequence[Mapping[str, Sequence[int]]]


class Sides:
    """Ours and the reference, each made when it is asked for.

    Args:
        make_ours: Starts an engine on ours.
        make_reference: Makes the reference.
        low_memory: Drop one before the other is made; recordings of ours then wait in a file.
    """

    def __init__(
        self,
        make_ours: Callable[[], LLM],
        make_reference: Callable[[], nn.Module],
        *,
        low_memory: bool = False,
    ) -> None:
        self._make_ours = make_ours
        self._make_reference = make_reference
        self._low_memory = low_memory
        self._ours: LLM | None = None
        self._reference: nn.Module | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def ours(self) -> LLM:
        """The engine on ours."""
        if self._ours is None:
            if self._low_memory:
                self._drop_reference()
            self._ours = self._make_ours()
        return self._ours

    def reference(self) -> nn.Module:
        """The reference."""
        if self._reference is None:
            if self._low_memory:
                self._drop_ours()
            self._reference = self._make_reference()
        return self._reference

    def record_ours(self, steps: Steps, name: str) -> Recording:
        """Activations of ours; from a file, mapped, where memory is short."""
        recording, _ = record_ours(self.ours().loaded.model, steps, name)
        if not self._low_memory:
            return recording
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="llmfw-verify-")
        file = Path(self._folder.name) / "activations.pt"
        torch.save(recording, file)
        del recording
        return torch.load(file, mmap=True, weights_only=True)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop both."""
        self._drop_ours()
        self._drop_reference()
        if self._folder is not None:
            self._folder.cleanup()

    def _drop_ours(self) -> None:
        if self._ours is not None:
            self._ours.shutdown()
            self._ours = None
            gc.collect()

    def _drop_reference(self) -> None:
        self._reference = None
        gc.collect()

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
