"""From the start of a process to its first token, by phase, in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfw.errors import EngineError
from llmfw_cli.bench.page_cache import evict, read_rate, resident

TIMEOUT_S = 1800


@dataclass(frozen=True)
class Start:
    """The median start of one kind.

    Args:
        page_cache: "cold" (the weights' files evicted before), "warm" (read before) or "none"
            (there are no files).
        resident: The part of the files that was in memory before, as measured; None: cannot tell.
        runs: Processes started.
        total_s: From the start of the process to the first token.
        phases: Seconds by phase, in order.
        weights_gb_per_s: Bytes of the loaded weights over the phase "weights".
        file_gb_per_s: A plain read of the same files in the same state of the page cache.
    """

    page_cache: str
    resident: float | None
    runs: int
    total_s: float
    phases: dict[str, float]
    weights_gb_per_s: float | None = None
    file_gb_per_s: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


def measure_start(
    model: str,
    arguments: Mapping[str, Any],
    files: Sequence[Path],
    *,
    runs: int,
    kinds: Sequence[str],
    prompt_len: int = 16,
    fresh_kernels: bool = False,
) -> Iterator[Start]:
    """Start `runs` processes for each kind of page cache.

    Args:
        model: As `LLM` takes it.
        arguments: Its keywords, JSON values.
        files: The weights' files; none for dummy weights.
        runs: Processes of each kind.
        kinds: "cold" and "warm"; not looked at without files.
        prompt_len: Tokens of the prompt.
        fresh_kernels: Give each process an empty kernel and tuning cache.

    Raises:
        EngineError: If a process fails, with what it wrote.
    """
    for kind in kinds if files else ("none",):
        results, there, rates = [], [], []
        for _ in range(runs):
            if kind == "cold":
                evict(files)
                rates.append(read_rate(files))
                evict(files)
            elif kind == "warm":
                read_rate(files)
                rates.append(read_rate(files))
            there.append(resident(files))
            results.append(_start(model, arguments, prompt_len, fresh_kernels))
        yield _median(kind, results, there, rates)


def weight_files(model: str) -> list[Path]:
    """The files that loading a model reads its weights from.

    Raises:
        ConfigError: If there is no such model.
    """
    from llmfw.weights import resolve_model

    path = resolve_model(model).checkpoint_path
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def _start(
    model: str, arguments: Mapping[str, Any], prompt_len: int, fresh_kernels: bool
) -> dict[str, Any]:
    with _environment(fresh_kernels) as environment:
        asked = {
            "model": model,
            "arguments": dict(arguments),
            "prompt": [1 + number % 8 for number in range(prompt_len)],
            "started": time.monotonic(),
        }
        done = subprocess.run(
            [sys.executable, "-m", "llmfw_cli.bench.first_token"],
            input=json.dumps(asked),
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        raise EngineError(f"a start of {model} failed:\n{done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def _environment(fresh_kernels: bool) -> Iterator[dict[str, str]]:
    if not fresh_kernels:
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="llmfw-cache-") as folder:
        yield {**os.environ, "LLMFW_CACHE": folder}


def _median(
    kind: str,
    results: Sequence[dict[str, Any]],
    there: Sequence[float | None],
    rates: Sequence[float],
) -> Start:
    phases = {
        name: statistics.median(result["phases"].get(name, 0.0) for result in results)
        for name in results[0]["phases"]
    }
    known = [each for each in there if each is not None]
    nbytes, seconds = results[0]["weight_bytes"], phases.get("weights", 0.0)
    return Start(
        page_cache=kind,
        resident=max(known) if known and kind == "cold" else min(known, default=None),
        runs=len(results),
        total_s=statistics.median(result["total"] for result in results),
        phases=phases,
        weights_gb_per_s=nbytes / seconds / 1e9 if nbytes and seconds else None,
        file_gb_per_s=statistics.median(rates) / 1e9 if rates else None,
        about={name: results[0][name] for name in ("plugin", "dtype", "device")},
    )
