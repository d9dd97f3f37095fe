"""Steps as CUDA graphs: captured once for each padded size, replayed ever after."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from llmfw.attention.state import StateSpec
from llmfw.engine.context_step import LENGTHS, ContextStep
from llmfw.engine.decode_step import DecodeOutput, DecodeStep
from llmfw.ops.table import Choice

logger = logging.getLogger("llmfw.engine")

#: Ops whose references read the batch on the host, which a capture forbids.
_DEVICE_SIDE_OPS = (
    "rope_and_cache",
    "latent_rope_and_cache",
    "paged_attention",
    "grouped_linear",
    "causal_conv1d",
    "selective_scan",
    "ssd_scan",
)


class Step(Protocol):
    """A computation on the device with fixed addresses and shapes."""

    def compute(self) -> DecodeOutput:
        """Run it."""


TStep = TypeVar("TStep", bound=Step)
MakeDecode = Callable[[int, int], DecodeStep]
MakeContext = Callable[[int], ContextStep]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The padded batch sizes: 1, 2, 4, then steps of 8 to 64, of 16 to 256, of 64 beyond."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_num_seqs + 64, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def kv_limits(max_model_len: int, attends: bool = True) -> list[int]:
    """The longest sequences graphs are captured for: short ones need fewer splits of attention."""
    if not attends:
        return [max_model_len]
    limits = [limit for limit in (1024, 8192) if limit < max_model_len]
    return [*limits, max_model_len]


def no_graphs(states: Iterable[StateSpec], choices: Iterable[Choice]) -> str | None:
    """Why the steps of a model cannot be captured, or None where they can.

    Args:
        states: Of its recurrent layers.
        choices: What its ops run by.
    """
    if not all(spec.on_device for spec in states):
        return "a recurrent layer does not read the batch on the device"
    for choice in choices:
        if choice.chosen == "reference" and choice.context.op in _DEVICE_SIDE_OPS:
            return f"{choice.context.op} runs by its reference"
    return None


@dataclass
class _Captured(Generic[TStep]):
    step: TStep
    graph: torch.cuda.CUDAGraph
    output: DecodeOutput

    def replay(self) -> DecodeOutput:
        self.graph.replay()
        return self.output


class StepGraphs:
    """Captured decode steps by batch size and longest sequence, and prefills by length.

    Args:
        make_decode: Makes the decode step for (batch size, longest sequence).
        make_context: Makes the prefill of a prompt padded to a length.
        max_num_seqs: Most requests of a step.
        limits: The longest sequences of decode steps, in order; the last is the longest of all.
    """

    def __init__(
        self,
        make_decode: MakeDecode,
        make_context: MakeContext,
        max_num_seqs: int,
        limits: list[int],
    ) -> None:
        self.sizes = batch_sizes(max_num_seqs)
        self.limits = limits
        self.lengths = [length for length in LENGTHS if length < limits[-1]]
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._decode: dict[tuple[int, int], _Captured[DecodeStep]] = {}
        self._context: dict[int, _Captured[ContextStep]] = {}
        self._capture_all(make_decode, make_context)
        logger.info("captured %d CUDA graphs", len(self._decode) + len(self._context))

    def _capture_all(self, make_decode: MakeDecode, make_context: MakeContext) -> None:
        """The largest first, so that the others fit into its memory."""
        for limit in reversed(self.limits):
            for size in reversed(self.sizes):
                self._decode[size, limit] = self._capture(make_decode(size, limit))
        for length in reversed(self.lengths):
            self._context[length] = self._capture(make_context(length))

    def decode(self, rows: np.ndarray, positions: np.ndarray) -> DecodeOutput:
        """Replay the decode step of these requests.

        Args:
            rows: The requests' rows in the table.
            positions: The position of each one's last token.

        Returns:
            Logits and greedy tokens of the padded batch; the first len(rows) count. They live in
            the graphs' memory until the next replay of any.
        """
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        limit = self.limits[bisect_left(self.limits, int(positions.max()) + 1)]
        captured = self._decode[size, limit]
        captured.step.stage(rows, positions)
        return captured.replay()

    def context(self, row: int, count: int) -> DecodeOutput:
        """Replay the prefill of one whole prompt of `count` tokens, at most `self.lengths[-1]`."""
        captured = self._context[self.lengths[bisect_left(self.lengths, count)]]
        captured.step.stage(row, count)
        return captured.replay()

    def _capture(self, step: TStep) -> _Captured[TStep]:
        # One for all captures, for memory is reused within a stream; torch's own for captures is of
        # the device of the process's first one.
        self._stream = stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            step.compute()  # compiles, tunes and allocates what must not happen in a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another model of the process goes on meanwhile, and may allocate.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        )
        with torch.inference_mode(), capture:
            output = step.compute()
        self._pool = self._pool or graph.pool()
        # Not owned, so that the next graph's logits take the place of these: graphs run one at a
        # time, and what a step leaves is read before the next one is replayed.
        return _Captured(step, graph, DecodeOutput(unowned(output.logits), unowned(output.tokens)))


class _Bytes:
    """Memory of a device, by the interface that torch and CuPy know each other's arrays by."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def unowned(x: torch.Tensor) -> torch.Tensor:
    """The same values at the same place on a GPU; their memory may be given to somebody else."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.as_tensor(_Bytes(x.data_ptr(), (last + 1) * x.element_size()), device=x.device)
    return memory.view(x.dtype).as_strided(x.shape, x.stride())
