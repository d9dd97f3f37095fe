"""transformers' own model of a checkpoint, beside which ours is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmfw.errors import ConfigError


def load_transformers(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its default attention, eager, ready to run.

    Args:
        model_dir: A directory with safetensors under the published names.
        dtype: As our model has it.
        device: Likewise.

    Raises:
        ConfigError: If the directory holds no safetensors, or transformers does not know the model.
    """
    if not any(model_dir.glob("*.safetensors")):
        raise ConfigError(
            f"{model_dir} has no safetensors, which transformers needs",
            hint="compare on a checkpoint directory with safetensors",
        )
    from transformers import AutoModelForCausalLM

    from llmfw.testing.reference import quiet_transformers

    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(model_dir), dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, OSError, KeyError) as exc:
            raise ConfigError(
                f"transformers cannot load {model_dir}: {exc}",
                hint="name a directory that it can load",
            ) from exc
    return loaded.to(device).eval()


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [prompts, longest], padded on the left with id 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
