"""Which kernel serves a product of few rows: measured once a shape on the device, kept on disk.

`LLMFW_TUNE=off` takes the built-in guess, `again` measures although results are kept. The file is
of one GPU, one set of versions and one state of the sources: a change of any makes a new one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from llmfw.errors import UsageError
from llmfw.kernels.cupy.compile import (
    DTYPE_CODES,
    arch_of,
    cache_dir,
    compile_cubin,
    device_index,
    source_digest,
)
from llmfw.kernels.cupy.linear import BUCKETS, CUBLAS, GEMV_ROWS, Variant, product, variants
from llmfw.ops.kernel import OpContext

logger = logging.getLogger("llmfw.kernels.cupy")

SETTINGS = ("auto", "off", "again")
COLD_BYTES = 160 << 20  # weights are rotated through at least this much memory, past every cache
MARGIN = 0.99  # an own kernel must take less than this part of cuBLAS' time


def setting() -> str:
    """The value of `LLMFW_TUNE`.

    Raises:
        UsageError: If it is not one of SETTINGS.
    """
    value = os.environ.get("LLMFW_TUNE", "auto")
    if value not in SETTINGS:
        raise UsageError(f"LLMFW_TUNE is {value!r}", hint=f"use one of {', '.join(SETTINGS)}")
    return value


def choices(context: OpContext) -> dict[int, Variant | None]:
    """The kernel for each bucket of rows, None where cuBLAS wins."""
    in_features, dtype = context["in_features"], context.dtype
    known = {bucket: variants(bucket, in_features, dtype) for bucket in BUCKETS}
    if setting() == "off":
        return {bucket: guess(bucket, known[bucket]) for bucket in BUCKETS}
    index = device_index(context.info.device)
    table = _Table.of(index)
    key = f"{str(dtype).removeprefix('torch.')} {in_features} -> {context['out_features']}"
    if key not in table.entries or (setting() == "again" and key not in table.fresh):
        table.put(key, measure(context, known))
    names = {bucket: table.best(key, bucket) for bucket in BUCKETS}
    return {
        bucket: next((v for v in known[bucket] if v.name == names[bucket]), None)
        for bucket in BUCKETS
    }


def guess(bucket: int, known: tuple[Variant, ...]) -> Variant | None:
    """A choice without measuring: own kernels for up to 4 rows only."""
    if bucket not in GEMV_ROWS:
        return None
    return next((v for v in known if v.name == "gemv_r2_k2_u2"), known[0] if known else None)


class _Table:
    """The kept microseconds: shape -> bucket -> name -> time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fresh: set[str] = set()
        self.entries: dict[str, dict[str, dict[str, float]]] = {}
        try:
            self.entries = json.loads(path.read_text())["times"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as exc:
            logger.warning("tuning results in %s cannot be read and are made anew: %s", path, exc)

    @staticmethod
    @functools.cache
    def of(index: int) -> _Table:
        return _Table(table_path(index))

    def put(self, key: str, times: dict[str, dict[str, float]]) -> None:
        self.entries[key] = times
        self.fresh.add(key)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"times": self.entries}, indent=1))
            partial.replace(self.path)
        except OSError as exc:
            logger.warning("tuning results are not kept: %s", exc)

    def best(self, key: str, bucket: int) -> str:
        times = self.entries[key].get(str(bucket), {})
        if not times:
            return CUBLAS
        name = min(times, key=lambda one: times[one])
        return name if times[name] < MARGIN * times.get(CUBLAS, float("inf")) else CUBLAS


def table_path(index: int) -> Path:
    """The file of this GPU, these versions and these sources."""
    import cupy

    gpu = torch.cuda.get_device_name(index)
    facts = (
        gpu,
        arch_of(index),
        torch.__version__,
        cupy.__version__,
        source_digest("gemv.cu", "skinny.cu"),
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    return cache_dir() / f"tune-{gpu.replace(' ', '-')}-{digest}.json"


def measure(
    context: OpContext, known: dict[int, tuple[Variant, ...]]
) -> dict[str, dict[str, float]]:
    """Microseconds of every variant and of cuBLAS, by bucket."""
    start = time.perf_counter()
    _compile_all(context, known)
    compiled = time.perf_counter()
    in_features, out_features = context["in_features"], context["out_features"]
    device = context.info.device
    size = in_features * out_features * context.dtype.itemsize
    copies = max(2, -(-COLD_BYTES // size))
    weights = torch.empty((copies, out_features, in_features), dtype=context.dtype, device=device)
    weights.normal_(0, 0.02)
    launches = min(128, max(16, int(3e9 / size)))  # about a millisecond a replay
    times: dict[str, dict[str, float]] = {}
    for bucket in BUCKETS:
        x = torch.randn((bucket, in_features), dtype=context.dtype, device=device)
        out = torch.empty((bucket, out_features), dtype=context.dtype, device=device)
        found = {CUBLAS: graph_time([_cublas(x, weight) for weight in weights], launches)}
        for variant in known[bucket]:
            run = product(variant, bucket, context)
            found[variant.name] = graph_time(
                [functools.partial(run, x, weight, None, out, bucket) for weight in weights],
                launches,
            )
        times[str(bucket)] = {name: round(value, 3) for name, value in found.items()}
    logger.info(
        "tuned %d -> %d (%s): compiled in %.1f s, measured in %.1f s",
        in_features,
        out_features,
        context.dtype,
        compiled - start,
        time.perf_counter() - compiled,
    )
    return times


def _cublas(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return functools.partial(F.linear, x, weight)


def _compile_all(context: OpContext, known: dict[int, tuple[Variant, ...]]) -> None:
    """Fill the cache of machine code, several sources at once."""
    arch = arch_of(device_index(context.info.device))
    jobs = {(variant.source, bucket) for bucket, found in known.items() for variant in found}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for job in [
            pool.submit(
                compile_cubin,
                source,
                arch,
                {"DTYPE": DTYPE_CODES[context.dtype], "IN": context["in_features"], "ROWS": bucket},
            )
            for source, bucket in sorted(jobs)
        ]:
            job.result()


def graph_time(runs: list[Callable[[], object]], launches: int = 64, repeats: int = 4) -> float:
    """Microseconds of one run: the least over replays of a graph that takes `runs` in turn."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(
        torch.cuda.Stream()
    ):  # `torch.cuda.graph` would empty the allocator each time
        graph.capture_begin()
        for i in range(launches):
            runs[i % len(runs)]()
        graph.capture_end()
    torch.cuda.synchronize()
    graph.replay()
    best = float("inf")
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / launches)
    return best
