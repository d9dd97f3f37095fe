"""Context requests by FlashInfer beside the CuPy pack's ways, on a GPU that has FlashInfer.

    python tests/gpu/bench_flashinfer.py > flashinfer.txt     (OUT=folder: flashinfer.json as well)

A step is some layers one after the other, eagerly, as prompts run; planning is part of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.bench_common import COPIED, DEVICE, attention_shape, context_of, randn
from gpu.kernel_cases import Arguments, Batch
from llmfw.kernels.cupy import attention as mixed
from llmfw.kernels.cupy.paged_plan import Heads, copies_refusal
from llmfw.kernels.cupy.prefill import Prefill
from llmfw.kernels.flashinfer.attention import PagedPrefill
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import OpContext

LAYERS = 16
STEPS = 4
AHEAD = 12_000_000  # cycles that the device waits, so that its time is not the host's
MOST_PAGED = 2e11  # operations; beyond them it is known to be slower than flash attention
Step = Callable[[], object]
BATCHES = {
    "8 x 2048": Batch(((2048, 2048),) * 8, contexts=8),
    "1 x 8192": Batch(((8192, 8192),), contexts=1),
    "2048 after 6144": Batch(((2048, 8192),), contexts=1),
    "32 x 256 after 1024": Batch(((256, 1280),) * 32, contexts=32),
}
SHORT = {
    "512 after 7680": Batch(((512, 8192),), contexts=1),
    "64 after 8128": Batch(((64, 8192),), contexts=1),
    "1 x 2048": Batch(((2048, 2048),), contexts=1),
    "1 x 1024": Batch(((1024, 1024),), contexts=1),
    "1 x 512": Batch(((512, 512),), contexts=1),
    "1 x 256": Batch(((256, 256),), contexts=1),
    "4 x 512": Batch(((512, 512),) * 4, contexts=4),
    "16 x 128": Batch(((128, 128),) * 16, contexts=16),
    "128 x 128": Batch(((128, 128),) * 128, contexts=128),
    "1 x 128 after 2048": Batch(((128, 2176),), contexts=1),
    "8 x 16 after 2048": Batch(((16, 2064),) * 8, contexts=8),
}


class Never:
    """Leaves all requests to paged_decode."""

    def serves(self, batch: mixed.ContextBatch) -> bool:
        return False


class Always:
    """Takes context requests however few they are."""

    def __init__(self, way: Any) -> None:
        self._way = way

    def serves(self, batch: mixed.ContextBatch) -> bool:
        return True

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._way(*args)  # type: ignore[no-any-return]


def ways(context: OpContext) -> dict[str, Callable[..., torch.Tensor]]:
    """The op by each way that serves the shape."""
    copied = COPIED and copies_refusal(Heads.of(context)) is None

    def by(way: Any) -> Callable[..., torch.Tensor]:
        return mixed.mixed_attention(context, way, copied)

    found = {"paged": by(Never())}
    if not context["softcap"]:
        found["gathered"] = by(Always(Prefill(context)))
    try:
        found["flashinfer"] = by(Always(PagedPrefill(context)))
    except Exception as exc:
        print(f"no FlashInfer for {dict(context.shape)}: {exc}")
    return found


def operations(shape: dict[str, int], batch: Batch) -> float:
    """Of scores and values that are not masked."""
    window = shape["window"]
    pairs = 0
    for new, total in batch.lengths:
        seen = torch.arange(total - new + 1, total + 1)
        pairs += int((seen.clamp(max=window) if window else seen).sum())
    return 4.0 * pairs * shape["num_heads"] * shape["head_dim"]


def drawn(shape: dict[str, int], batch: Batch) -> Arguments:
    """Arguments of the op, drawn on the device."""
    generator = torch.Generator().manual_seed(0)
    metadata, view, blocks = paged_batch(
        batch.lengths, batch.contexts, shape["block_size"], generator, DEVICE
    )
    kv_shape = (blocks, shape["block_size"], shape["num_kv_heads"], shape["head_dim"])
    q = randn(sum(metadata.query_lens), shape["num_heads"], shape["head_dim"])
    args = (q, randn(*kv_shape), randn(*kv_shape), metadata, view, shape["head_dim"] ** -0.5)
    limits = {"window": shape["window"] or None, "softcap": 20.0 if shape["softcap"] else None}
    return args, limits


def step_of(call: Callable[..., torch.Tensor], arguments: Arguments) -> Step:
    """All layers of a batch, planned anew in each step."""
    (q, k, v, metadata, *rest), kwargs = arguments

    def step() -> None:
        now = replace(metadata)
        for _ in range(LAYERS):
            call(q, k, v, now, *rest, **kwargs)

    return step


def measure(steps: dict[str, Step]) -> dict[str, tuple[float, float]]:
    """Microseconds of a layer on the device and on the host, the least of interleaved steps."""
    best = {name: (float("inf"), float("inf")) for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(AHEAD)
            begin = time.perf_counter()
            start.record()
            step()
            end.record()
            host = time.perf_counter() - begin
            end.synchronize()
            device = start.elapsed_time(end) * 1e3 / LAYERS
            least = best[name]
            best[name] = min(least[0], device), min(least[1], host * 1e6 / LAYERS)
    return best


def rows_of(label: str, shape: dict[str, int], batches: dict[str, Batch]) -> list[dict[str, Any]]:
    """Each batch by each way."""
    context = context_of("paged_attention", shape)
    calls, rows = ways(context), []
    for name, batch in batches.items():
        arguments = drawn(shape, batch)
        steps = {
            way: step_of(call, arguments)
            for way, call in calls.items()
            if way != "paged" or shape["softcap"] or operations(shape, batch) < MOST_PAGED
        }
        for step in steps.values():
            step()
        times = measure(steps)
        work = operations(shape, batch)
        row: dict[str, Any] = {"layers": label, "batch": name}
        for way, (device, host) in times.items():
            row[way] = {
                "us": round(device, 1),
                "host_us": round(host, 1),
                "tflops": round(work / device / 1e6, 1),
            }
        told = "  ".join(
            f"{way} {row[way]['us']:8.1f} us {row[way]['tflops']:6.1f} TFLOP/s"
            f" (host {row[way]['host_us']:6.1f})"
            for way in times
        )
        print(f"{label:12} {name:20} {told}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """All shapes."""
    plain = attention_shape("L")
    wide = {**plain, "num_heads": 16, "head_dim": 256, "v_head_dim": 256}
    shapes = {
        "L": plain,
        "L softcap": {**plain, "softcap": 1},
        "L window": {**plain, "window": 1024},
        "256": wide,
        "256 softcap": {**wide, "softcap": 1},
        "64": {**plain, "head_dim": 64, "v_head_dim": 64},
    }
    rows = rows_of("L", plain, BATCHES | SHORT)
    few = {name: SHORT[name] for name in ("1 x 2048", "1 x 512", "8 x 16 after 2048")}
    for label, shape in list(shapes.items())[1:]:
        rows += rows_of(label, shape, BATCHES | few)
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "flashinfer.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
