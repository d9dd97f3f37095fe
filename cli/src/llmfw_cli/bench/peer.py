"""The peer that everybody has: transformers' `generate` on the same checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from llmfw_cli.bench.measure import Timing, check_length
from llmfw_cli.bench.workload import Workload
from llmfw_cli.transformers_model import left_padded, load_transformers


class Transformers:
    """transformers' own model with its default attention, eager.

    Args:
        model_dir: A directory with safetensors.
        dtype: As our model has it.
        device: Likewise.

    Raises:
        ConfigError: If transformers cannot load the model.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._model = load_transformers(model_dir, dtype, device)
        self._device = device

    def run(self, workload: Workload) -> Timing:
        """Prefill alone, then the whole: the first token's time is that of one new token."""
        first, most = self._generate(workload, 1), max(workload.new_tokens)
        total = first if most == 1 else self._generate(workload, most)
        return Timing(min(first, total), total)

    def _generate(self, workload: Workload, new_tokens: int) -> float:
        """Seconds of one call; prompts are padded on the left, as transformers wants them."""
        ids, mask = left_padded(workload.prompts, self._device)
        started = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - started
        check_length(made.shape[1] - ids.shape[1], new_tokens)
        return seconds
