"""The peer that everybody has: transformers' `generate` on the same checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from llmfw.errors import ConfigError
from llmfw_cli.bench.measure import Timing, check_length
from llmfw_cli.bench.workload import Workload


class Transformers:
    """transformers' own model with its default attention, eager.

    Args:
        model_dir: A directory with safetensors.
        dtype: As our model has it.
        device: Likewise.

    Raises:
        ConfigError: If the directory holds no safetensors.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        if not any(model_dir.glob("*.safetensors")):
            raise ConfigError(
                f"{model_dir} has no safetensors, which transformers needs",
                hint="compare on a checkpoint directory with safetensors",
            )
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        self._model = loaded.to(device).eval()
        self._device = device

    def run(self, workload: Workload) -> Timing:
        """Prefill alone, then the whole: the first token's time is that of one new token."""
        first = self._generate(workload, 1)
        total = first if workload.new_tokens == 1 else self._generate(workload, workload.new_tokens)
        return Timing(min(first, total), total)

    def _generate(self, workload: Workload, new_tokens: int) -> float:
        """Seconds of one call; prompts are padded on the left, as transformers wants them."""
        longest = max(len(prompt) for prompt in workload.prompts)
        ids = torch.zeros(len(workload.prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(workload.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
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
        check_length(made.shape[1] - longest, new_tokens)
        return seconds
