"""What a step has to do at least, from the model's modules: bytes read and operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from llmfw.attention.metadata import CacheSpec
from llmfw.attention.state import StateSpec
from llmfw.layers import Embedding, LMHead, MoE

if TYPE_CHECKING:
    from llmfw_cli.bench.workload import Workload


@dataclass(frozen=True)
class _Weights:
    """Weights that are read alike.

    nbytes, matrix_elements: of them; elements are those of matrices, which rows are multiplied by.
    experts, chosen: how many there are and how many a token goes through; 1 and 1 for the rest.
    head: they give logits, for the last token of a prompt alone.
    """

    nbytes: int
    matrix_elements: int
    experts: int = 1
    chosen: int = 1
    head: bool = False


class ModelCosts:
    """Lower bounds of a model's steps.

    A decode step reads every weight once (of experts those that random routing is expected to
    choose), and each request's keys and values or state. Embeddings are read by rows, which does
    not count, unless the head is tied to them.

    Args:
        model: A built model, its weights loaded or not.
    """

    def __init__(self, model: Any) -> None:
        self._weights = list(_weights_of(model))
        self._caches: list[CacheSpec] = list(model.cache_specs().values())
        self._states: list[StateSpec] = list(model.state_specs().values())
        self._heads: list[tuple[int, CacheSpec]] = [
            (module.num_heads, module.cache_spec())
            for module in model.modules()
            if isinstance(getattr(module, "num_heads", None), int) and hasattr(module, "cache_spec")
        ]

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights that a step of so many tokens is expected to read."""
        return sum(
            each.nbytes * (1 - (1 - each.chosen / each.experts) ** batch) for each in self._weights
        )

    def cache_bytes(self, context: float) -> float:
        """Bytes of one request's keys, values and state; a window bounds what is read."""
        paged = sum(
            spec.bytes_per_token * min(context, spec.window or context) for spec in self._caches
        )
        return paged + 2 * sum(spec.bytes_per_request for spec in self._states)

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step reads (state is also written).

        Args:
            batch: Requests.
            context: Tokens of each in the cache.
        """
        return self.weight_bytes(batch) + batch * self.cache_bytes(context)

    def workload_seconds(self, workload: Workload, bandwidth: float, matrix_rate: float) -> float:
        """The least time of a workload: its prompts' operations, then its decode steps' bytes.

        A request's first token comes from its prompt, each other from a decode step. There are as
        many of them as the longest request wants, if all run at once; experts count as in steps
        of equal size.

        Args:
            workload: Prompts and new tokens.
            bandwidth: Bytes a second of reading memory.
            matrix_rate: Operations a second.
        """
        prompts = [len(prompt) for prompt in workload.prompts]
        decoded = [new - 1 for new in workload.new_tokens]
        operations = sum(self.prefill_operations(each) for each in prompts)
        steps = max(decoded)
        weights = steps * self.weight_bytes(round(sum(decoded) / steps)) if steps else 0.0
        ends = [prompt + new for prompt, new in zip(prompts, decoded, strict=True)]
        of_context = (self.cache_bytes(context) for context in range(max(ends) + 1))
        below = list(itertools.accumulate(of_context, initial=0.0))  # of all smaller contexts
        caches = sum(
            below[end + 1] - below[prompt + 1] for prompt, end in zip(prompts, ends, strict=True)
        )
        return operations / matrix_rate + (weights + caches) / bandwidth

    def prefill_operations(self, prompt: int, batch: int = 1) -> float:
        """Multiplications and additions of `batch` prompts, causal attention included."""
        products = 0.0
        for each in self._weights:
            rows = batch if each.head else batch * prompt
            products += 2 * each.matrix_elements * each.chosen / each.experts * rows
        attended = 0.0
        for heads, spec in self._heads:
            width = spec.head_dim + (spec.head_dim if spec.v_head_dim is None else spec.v_head_dim)
            window = min(prompt, spec.window or prompt)
            pairs = window * (window + 1) / 2 + (prompt - window) * window
            attended += 2 * heads * width * pairs
        return products + batch * attended


def _weights_of(model: nn.Module) -> Iterator[_Weights]:
    """Each parameter once; a head counts as one where it is tied to an embedding, too."""
    heads = [module for module in model.modules() if isinstance(module, LMHead)]
    chosen = dict(_expert_counts(model))
    seen: set[int] = set()
    for module in (*heads, *model.modules()):
        own: list[Any] = [
            each
            for each in module.parameters(recurse=False)
            if id(each) not in seen and not isinstance(module, Embedding)
        ]
        seen |= {id(each) for each in own}
        if own:
            experts, top_k = chosen.get(id(module), (1, 1))
            yield _Weights(
                sum(each.nbytes for each in own),
                sum(each.numel() for each in own if each.ndim > 1),
                experts,
                top_k,
                isinstance(module, LMHead),
            )


def _expert_counts(model: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """Modules that hold stacked experts: how many, and how many a token goes through."""
    for module in model.modules():
        if isinstance(module, MoE):
            yield id(module.experts), (module.moe.num_experts, module.moe.top_k)
