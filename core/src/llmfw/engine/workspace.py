"""Memory that steps and graphs take beside weights and caches; the caches get what it leaves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.engine.context_step import LENGTHS
from llmfw.engine.cuda_graphs import batch_sizes, kv_limits
from llmfw.engine.sampler import ROWS_AT_ONCE

GRAPH_BYTES = 2 << 20  # what the driver keeps of one graph of a few hundred launches


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` takes at its peak beyond what is allocated before it; 0 off CUDA.

    It runs twice: what the first run tunes, compiles and keeps is no part of a step's workspace.
    """
    run()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def sampling_bytes(max_num_seqs: int, logits_row: int) -> int:
    """Bytes that choosing tokens takes at most, the logits included.

    Beside the logits lies a float32 copy with what penalties change, then for a part of the rows
    three times that: float32 values, their log probabilities, the best of them.

    Args:
        max_num_seqs: Most requests of a step.
        logits_row: Bytes of one request's logits in float32.
    """
    return logits_row * (2 * max_num_seqs + 3 * min(max_num_seqs, ROWS_AT_ONCE))


def graph_bytes(
    step_bytes: int,
    step_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    logits_row: int,
    attends: bool = True,
) -> int:
    """Bytes to leave for the graphs of all batch sizes.

    Graphs share one pool, in which activations and logits of the largest step serve all.

    Args:
        step_bytes: Workspace of an eager step of `step_tokens` tokens.
        step_tokens: Tokens of that step.
        max_num_seqs: Most requests of a decode step.
        max_model_len: Longest sequence.
        logits_row: Bytes of one request's logits.
        attends: Whether the model keeps keys and values.
    """
    sizes, limits = batch_sizes(max_num_seqs), kv_limits(max_model_len, attends)
    prefills = [length for length in LENGTHS if length < max_model_len]
    largest = max(max_num_seqs, *prefills) if prefills else max_num_seqs
    activations = step_bytes * min(largest, step_tokens) // max(step_tokens, 1)
    logits = logits_row * max_num_seqs
    count = len(sizes) * len(limits) + len(prefills)
    return activations + logits + GRAPH_BYTES * count
