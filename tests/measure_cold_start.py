"""What converting and building save at a start: `python tests/measure_cold_start.py [MODEL]`.

Converts and builds the model in a temporary directory, then starts it from MODEL, from the
checkpoint and from the engine, each in a process of its own, with an empty cache (cold) and with
the cache that the start before it has left (warm). The starts take turns. Prints the medians of
each phase in seconds as a table; with --json the single starts too.

On a GPU: `python tests/measure_cold_start.py DIRECTORY --device cuda --out start.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("import", "prepare", "build", "weights", "tokenizer", "engine", "first token")
KINDS = ("model", "checkpoint", "engine")


def start(model: str, device: str) -> dict[str, float]:
    """Starts a model in this process and times its phases."""
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    import torch  # noqa: F401

    import llmfw.llm
    import llmfw.models.load
    from llmfw import LLM, SamplingParams

    seconds["import"] = time.perf_counter() - begin

    def timed(module: Any, name: str, phase: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            result = real(*args, **more)
            seconds[phase] = time.perf_counter() - begin
            return result

        setattr(module, name, call)

    timed(llmfw.models.load, "prepare_model", "prepare")
    timed(llmfw.models.load, "build", "build")
    timed(llmfw.models.load, "_load_checkpoint", "weights")
    timed(llmfw.llm, "_tokenizer", "tokenizer")
    timed(llmfw.llm, "_start_engine", "engine")
    with LLM(model, device=device) as llm:
        begin = time.perf_counter()
        llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1))
        seconds["first token"] = time.perf_counter() - begin
    return seconds


def in_a_process(model: str, device: str, cache: Path) -> dict[str, float]:
    """The phases of one start, and its wall time from the outside."""
    environment = {**os.environ, "LLMFW_CACHE": str(cache)}
    command = [sys.executable, __file__, model, "--device", device, "--one"]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "total": wall}


def measure(model: str, device: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """All starts, by what was started and how the cache was."""
    from llmfw.engine.build_engine import build_engine
    from llmfw.models.convert import convert_checkpoint

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        convert_checkpoint(model, folder / "checkpoint")
        build_engine(folder / "checkpoint", folder / "engine", device=device)
        models = {"model": model, **{name: str(folder / name) for name in KINDS[1:]}}
        for _ in range(repeats):
            for kind, path in models.items():
                cache = folder / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                for state in ("cold", "warm"):
                    one = in_a_process(path, device, cache)
                    found.setdefault(f"{kind}, {state}", []).append(one)
    return found


def main() -> None:
    """Measures, or is one of the processes that are measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for every single start, as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(start(args.model, args.device)) + "\n")
        return
    found = measure(args.model, args.device, args.repeats)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1))
    heads = ("start", *PHASES, "total")
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for name, starts in found.items():
        medians = [statistics.median(one[phase] for one in starts) for phase in heads[1:]]
        sys.stdout.write(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |\n")


if __name__ == "__main__":
    main()
