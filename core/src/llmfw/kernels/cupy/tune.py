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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmfw.cache import find
from llmfw.errors import UsageError
from llmfw.kernels.cupy.compile import (
    arch_of,
    cache_dir,
    compile_cubin,
    constants_of,
    device_index,
    source_digest,
)
from llmfw.kernels.cupy.norm import rms_norm
from llmfw.kernels.cupy.products import GEMV_ROWS, TILED_ROWS, Variant
from llmfw.ops.kernel import OpContext

logger = logging.getLogger("llmfw.kernels.cupy")

SETTINGS = ("auto", "off", "again")
COLD_BYTES = 160 << 20  # weights are rotated through at least this much memory, past every cache
MARGIN = 0.99  # an own kernel must take less than this part of the other's time
OTHERWISE = "otherwise"
NORMED_VALUES = 1024  # of a row of the norm that is timed with products


def setting() -> str:
    """The value of `LLMFW_TUNE`.

    Raises:
        UsageError: If it is not one of SETTINGS.
    """
    value = os.environ.get("LLMFW_TUNE", "auto")
    if value not in SETTINGS:
        raise UsageError(f"LLMFW_TUNE is {value!r}", hint=f"use one of {', '.join(SETTINGS)}")
    return value


@dataclass(frozen=True)
class Contest:
    """What may serve a product of few rows.

    Args:
        context: The op, dtype and shape.
        variants: Own kernels by bucket of rows.
        weight_rows: Rows of the weight.
        outputs: Values of a row of the result.
        otherwise: Serves where no own kernel does, called with (x, weight) and perhaps a bias.
    """

    context: OpContext
    variants: Mapping[int, tuple[Variant, ...]]
    weight_rows: int
    outputs: int
    otherwise: Callable[..., torch.Tensor]

    @property
    def key(self) -> str:
        """Its name in the table of results."""
        dtype = str(self.context.dtype).removeprefix("torch.")
        gated = " gated" if self.weight_rows != self.outputs else ""
        return f"{dtype} {self.context['in_features']} -> {self.weight_rows}{gated}"


def choices(contest: Contest, margin: float = MARGIN) -> dict[int, Variant]:
    """The kernel for each bucket of rows where an own one wins.

    Args:
        contest: What may serve.
        margin: An own kernel must take less than this part of the other's time.
    """
    known = contest.variants
    if setting() == "off":
        guesses = {bucket: guess(bucket, known[bucket]) for bucket in known}
        return {bucket: variant for bucket, variant in guesses.items() if variant is not None}
    table = _Table.of(device_index(contest.context.info.device))
    key = contest.key
    if not table.has(contest) or (setting() == "again" and key not in table.fresh):
        table.put(key, measure(contest))
    return {
        bucket: variant
        for bucket in known
        for variant in known[bucket]
        if variant.name == table.best(key, bucket, margin)
    }


def details(contest: Contest, chosen: Mapping[int, Variant]) -> str:
    """Which own kernel serves how many rows, with both times in microseconds where measured."""
    entries: dict[str, dict[str, dict[str, float]]] = {}
    if setting() != "off":
        entries = _Table.of(device_index(contest.context.info.device)).entries
    parts = []
    for bucket, variant in chosen.items():
        rows = f"{bucket} row{'s' if bucket > 1 else ''}"
        rows = rows if bucket in GEMV_ROWS else f"up to {rows}"
        times = entries.get(contest.key, {}).get(str(bucket))
        took = f" {times[variant.name]} us (otherwise {times[OTHERWISE]})" if times else ""
        parts.append(f"{rows}: {variant.name}{took}")
    return "; ".join(parts) or "no own kernel"


def guess(bucket: int, known: tuple[Variant, ...]) -> Variant | None:
    """A choice without measuring: own kernels for up to 4 rows only."""
    if bucket not in GEMV_ROWS:
        return None
    return next((v for v in known if v.name.endswith("_k2_u2")), known[0] if known else None)


class _Table:
    """The kept microseconds: shape -> bucket -> name -> time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fresh: set[str] = set()
        self.entries: dict[str, dict[str, dict[str, float]]] = {}
        kept = find(f"kernels/{path.name}") or path
        try:
            self.entries = json.loads(kept.read_text())["times"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as exc:
            logger.warning("tuning results in %s cannot be read and are made anew: %s", kept, exc)

    @staticmethod
    @functools.cache
    def of(index: int) -> _Table:
        return _Table(table_path(index))

    def has(self, contest: Contest) -> bool:
        """Whether every variant of today was measured: the rule that names them may be newer."""
        kept = self.entries.get(contest.key, {})
        return contest.key in self.entries and all(
            variant.name in kept.get(str(bucket), {})
            for bucket, found in contest.variants.items()
            for variant in found
        )

    def put(self, key: str, times: dict[str, dict[str, float]]) -> None:
        self.entries[key] = times
        self.fresh.add(key)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"times": self.entries}, indent=1))
            partial.replace(self.path)
            find(f"kernels/{self.path.name}")  # counts as used
        except OSError as exc:
            logger.warning("tuning results are not kept: %s", exc)

    def best(self, key: str, bucket: int, margin: float) -> str:
        times = self.entries[key].get(str(bucket), {})
        own = {name: time for name, time in times.items() if name != OTHERWISE}
        name = min(own, key=lambda one: own[one], default=OTHERWISE)
        wins = own and own[name] < margin * times.get(OTHERWISE, float("inf"))
        return name if wins else OTHERWISE


def table_path(index: int) -> Path:
    """The file of this GPU, these versions and these sources."""
    import cupy

    gpu = torch.cuda.get_device_name(index)
    facts = (
        gpu,
        arch_of(index),
        torch.__version__,
        cupy.__version__,
        source_digest("gemv.cu", "streamed.cu", "tiled.cu"),
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    return cache_dir() / f"tune-{gpu.replace(' ', '-')}-{digest}.json"


def measure(contest: Contest) -> dict[str, dict[str, float]]:
    """Microseconds of every variant and of what serves otherwise, by bucket."""
    start = time.perf_counter()
    _compile_all(contest)
    compiled = time.perf_counter()
    context, in_features = contest.context, contest.context["in_features"]
    dtype, device = context.dtype, context.info.device
    size = in_features * contest.weight_rows * dtype.itemsize
    copies = max(2, -(-COLD_BYTES // size))
    shape = (copies, contest.weight_rows, in_features)
    weights = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)
    launches = min(128, max(16, int(3e9 / size)))  # about a millisecond a replay
    times: dict[str, dict[str, float]] = {}
    for bucket, found in contest.variants.items():
        if not found:
            continue
        x = torch.randn((bucket, in_features), dtype=dtype, device=device)
        out = torch.empty((bucket, contest.outputs), dtype=dtype, device=device)
        company = Company(bucket, context)
        runs = [partial(contest.otherwise, x, weight) for weight in weights]
        results = {OTHERWISE: graph_time(company.of(runs), launches)}
        for variant in found:
            product = variant.build(bucket, context, contest.outputs)
            own = [partial(product, x, weight, None, out, bucket) for weight in weights]
            results[variant.name] = graph_time(company.of(own), launches)
        times[str(bucket)] = {name: round(value, 3) for name, value in results.items()}
    logger.info(
        "tuned %s: compiled in %.1f s, measured in %.1f s",
        contest.key,
        compiled - start,
        time.perf_counter() - compiled,
    )
    return times


class Company:
    """What runs before each product of a model: a norm of ours where it is not in the product.

    A library's kernel does not overlap with one of ours, which a graph of it alone would not show.

    Args:
        bucket: Most rows of x.
        context: The op, dtype and device.
    """

    def __init__(self, bucket: int, context: OpContext) -> None:
        self._norm: Callable[[], object] | None = None
        if bucket not in TILED_ROWS:
            return
        shape = {"hidden_size": NORMED_VALUES}
        norm = rms_norm(OpContext("rms_norm", context.dtype, context.info, shape))
        x = torch.ones((bucket, NORMED_VALUES), dtype=context.dtype, device=context.info.device)
        self._norm = partial(norm, x, x[0], 1e-6)

    def of(self, products: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
        """Each product in its company."""
        return [partial(self._both, product) for product in products]

    def _both(self, product: Callable[[], object]) -> None:
        if self._norm is not None:
            self._norm()
        product()


def _compile_all(contest: Contest) -> None:
    """Fill the cache of machine code, several sources at once."""
    context = contest.context
    arch = arch_of(device_index(context.info.device))
    jobs = {
        (variant.source, tuple(sorted(variant.constants(bucket, context).items())))
        for bucket, found in contest.variants.items()
        for variant in found
    }
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        started = [
            pool.submit(
                compile_cubin,
                source,
                arch,
                constants_of(context.info.device, context.dtype, dict(constants)),
            )
            for source, constants in sorted(jobs)
        ]
        for job in started:
            job.result()


def graph_time(runs: Sequence[Callable[[], object]], launches: int = 64, repeats: int = 4) -> float:
    """Microseconds of one run: the least over replays of a graph that takes `runs` in turn."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(
        torch.cuda.Stream()
    ):  # `torch.cuda.graph` would empty the allocator each time
        graph.capture_begin(capture_error_mode="thread_local")  # as StepGraphs captures
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
