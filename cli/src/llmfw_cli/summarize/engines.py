"""The two engines behind one interface: new tokens for prompts, and the score of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmfw_cli.transformers_model import left_padded, load_transformers

if TYPE_CHECKING:
    from llmfw import LLM


class Engine(Protocol):
    """What is compared."""

    name: str

    def complete(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """New tokens for each prompt, greedy or by beam search, given at once."""

    def log_likelihood(self, ids: list[int]) -> float:
        """Sum of the log probabilities of all tokens but the first."""


class Ours:
    """llmfw.

    Args:
        llm: The loaded model.
        new_tokens: Most tokens of a summary.
        num_beams: Above 1, a beam search.
    """

    name = "llmfw"

    def __init__(self, llm: LLM, new_tokens: int, num_beams: int = 1) -> None:
        from llmfw import SamplingParams

        beams: dict[str, Any] = {"num_beams": num_beams} if num_beams > 1 else {"temperature": 0.0}
        self._llm = llm
        self._params = SamplingParams(max_tokens=new_tokens, detokenize=False, **beams)
        self._scoring = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )

    def complete(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Engine`."""
        outputs = self._llm.generate(list(prompts), self._params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_likelihood(self, ids: list[int]) -> float:
        """See `Engine`."""
        output = self._llm.generate(ids, self._scoring)
        assert output.prompt_logprobs is not None
        pairs = zip(ids, output.prompt_logprobs, strict=True)
        return sum(entry[token].logprob for token, entry in pairs if entry is not None)


class Theirs:
    """transformers.

    Args:
        model_dir: A directory with safetensors.
        dtype, device: As ours has them.
        new_tokens: Most tokens of a summary.
        num_beams: Above 1, a beam search.

    Raises:
        ConfigError: If transformers cannot load the model.
    """

    name = "hf"

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        device: torch.device,
        new_tokens: int,
        num_beams: int = 1,
    ) -> None:
        self._model = load_transformers(model_dir, dtype, device)
        self._device = device
        self._new_tokens = new_tokens
        self._beams = num_beams
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def complete(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Engine`; several prompts are padded on the left."""
        ids, mask = left_padded(prompts, self._device)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._new_tokens,
                do_sample=False,
                num_beams=self._beams,
                pad_token_id=0,
            )
        return [self._up_to_end(row) for row in made[:, ids.shape[1] :].tolist()]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        """Without what fills the row after an end token."""
        end = next((n for n, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[: end + 1]

    def log_likelihood(self, ids: list[int]) -> float:
        """See `Engine`."""
        tokens = torch.tensor([ids], device=self._device)
        with torch.inference_mode():
            logits = self._model(tokens).logits[0, :-1]  # [tokens - 1, vocab]
            values = logits.float().log_softmax(dim=-1)
            return float(values.gather(1, tokens[0, 1:, None]).double().sum())
