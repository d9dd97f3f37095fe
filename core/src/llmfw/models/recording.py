"""Recording what modules give, step by step, while a model runs: for a look inside."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from llmfw.errors import UsageError


class ModuleRecorder:
    """A `with` block in which the outputs of chosen modules are kept.

    `arrays` maps "step/module" to float32 [tokens, ...], where step counts the model's calls from 0
    (leading zeros keep them in order), and "step/input_ids" and "step/position_ids" say which
    tokens they are: those of all requests, packed. A decoder layer's pair (hidden, residual) is
    kept as its sum, the stream. Steps replayed from CUDA graphs call no module and are not seen.

    Args:
        model: The model, loaded.
        patterns: Names of modules as in `named_modules`, where * and ? stand for any characters.

    Raises:
        UsageError: If a pattern names no module.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] = ("*",)) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._model = model
        self._step = -1
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        names = [name for name, _ in model.named_modules() if name]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"no module is named {pattern!r}",
                    hint=f"names look like {', '.join(names[:4])}; * stands for any characters",
                )
        self._chosen = {
            name: module
            for name, module in model.named_modules()
            if name and any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    @property
    def silent(self) -> list[str]:
        """Chosen modules that gave nothing: containers, and those whose work a kernel took over."""
        seen = {key.partition("/")[2] for key in self.arrays}
        return [name for name in self._chosen if name not in seen]

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez(file, **self.arrays)  # type: ignore[arg-type]

    def __enter__(self) -> ModuleRecorder:
        self._hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self._chosen.items():
            self._hooks.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step += 1
        inputs = dict(zip(("attn_metadata", "input_ids", "position_ids"), args, strict=False))
        for name in ("input_ids", "position_ids"):
            value = kwargs.get(name, inputs.get(name))
            if isinstance(value, torch.Tensor):
                self.arrays[self._key(name)] = value.cpu().numpy().copy()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            value = _tensor_of(output)
            if value is not None and self._step >= 0:
                # A copy: kernels may write into it, and its memory is used again.
                self.arrays[self._key(name)] = value.detach().float().cpu().clone().numpy()

        return keep

    def _key(self, name: str) -> str:
        return f"{self._step:04d}/{name}"


def _tensor_of(output: Any) -> torch.Tensor | None:
    """A module's tensor, or the sum of a layer's (hidden, residual)."""
    if isinstance(output, tuple) and output:
        first, *rest = output
        if len(rest) == 1 and isinstance(rest[0], torch.Tensor) and first.shape == rest[0].shape:
            return first.float() + rest[0].float()  # type: ignore[no-any-return]
        output = first
    return output if isinstance(output, torch.Tensor) else None
