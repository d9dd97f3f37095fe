"""Decode steps as CUDA graphs: captured once for each padded batch size, replayed every step."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmfw.engine.decode_step import DecodeOutput, DecodeStep
from llmfw.errors import DeviceError

logger = logging.getLogger("llmfw.engine")

MakeStep = Callable[[int, int], DecodeStep]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The padded batch sizes: 1, 2, 4, then steps of 8 to 64, of 16 to 256, of 64 beyond."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_num_seqs + 64, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def kv_limits(max_model_len: int) -> list[int]:
    """The longest sequences graphs are captured for: short ones need fewer splits of attention."""
    limits = [limit for limit in (1024, 8192) if limit < max_model_len]
    return [*limits, max_model_len]


@dataclass
class _Captured:
    step: DecodeStep
    graph: torch.cuda.CUDAGraph
    output: DecodeOutput


class DecodeGraphs:
    """Captured decode steps by batch size and longest sequence.

    Args:
        make_step: Makes the step for (batch size, longest sequence).
        max_num_seqs: Most requests of a step.
        max_model_len: Longest sequence.
    """

    def __init__(self, make_step: MakeStep, max_num_seqs: int, max_model_len: int) -> None:
        self._make_step = make_step
        self.sizes = batch_sizes(max_num_seqs)
        self.limits = kv_limits(max_model_len)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None

    def capture_all(self) -> None:
        """Capture every graph, the largest first, so that the others fit into its memory.

        Raises:
            DeviceError: If the memory does not suffice.
        """
        try:
            for limit in reversed(self.limits):
                for size in reversed(self.sizes):
                    self._capture(size, limit)
        except torch.cuda.OutOfMemoryError as exc:
            raise DeviceError(
                f"no memory for the CUDA graphs of up to {self.sizes[-1]} requests",
                hint="lower max_num_seqs or kv_cache_memory, or turn CUDA graphs off",
            ) from exc
        logger.info("captured %d CUDA graphs", len(self._captured))

    def run(self, rows: np.ndarray, positions: np.ndarray) -> DecodeOutput:
        """Replay the step of these requests.

        Args:
            rows: The requests' rows in the table.
            positions: The position of each one's last token.

        Returns:
            Logits and greedy tokens of the padded batch; the first len(rows) count. They live in
            the graphs' memory until the next replay of any.
        """
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        limit = self.limits[bisect_left(self.limits, int(positions.max()) + 1)]
        captured = self._captured[size, limit]
        captured.step.stage(rows, positions)
        captured.graph.replay()
        return captured.output

    def _capture(self, size: int, limit: int) -> None:
        step = self._make_step(size, limit)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            step.compute()  # compiles, tunes and allocates what must not happen in a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self._pool):
            output = step.compute()
        self._pool = self._pool or graph.pool()
        self._captured[size, limit] = _Captured(step, graph, output)
