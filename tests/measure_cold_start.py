"""What converting and building save at a start: `python tests/measure_cold_start.py [MODEL]`.

Converts and builds the model, then starts it from MODEL, from the checkpoint and from the engine,
each in a process of its own, with an empty cache of llmfw (cold) and with the cache that the start
before it has left (warm). The starts take turns, and the weights' files are in memory before each.
Prints the medians of each phase in seconds as a table.

On a GPU, where 16 GB take their time:

    llmfw bench make-checkpoint docs/benchmarks/shapes/llama-3.1-8b.json /tmp/L
    python tests/measure_cold_start.py /tmp/L --device cuda --max-model-len 4096 --repeats 1 \
        --kinds model,engine --work /tmp --limit 100 --out start.json
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmfw.weights import resolve_model
from llmfw_cli.bench.page_cache import evict, read_rate, resident
from llmfw_cli.bench.startup import weight_files

KINDS = ("model", "checkpoint", "engine")
PROMPT = list(range(1, 17))


def command(*arguments: str) -> float:
    """Runs `llmfw` in a process of its own, which leaves no memory taken; gives its seconds."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "llmfw_cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin


def one_start(model: str, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """The phases of one start up to its first token, and the seconds of its process up to there."""
    has_tokenizer = (resolve_model(model).model_dir / "tokenizer.json").is_file()
    asked = {
        "model": model,
        "arguments": {**settings, "skip_tokenizer_init": not has_tokenizer},
        "prompt": PROMPT,
        "started": time.monotonic(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "llmfw_cli.bench.first_token"],
        input=json.dumps(asked),
        env={**os.environ, "LLMFW_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    sys.stderr.write(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    return {**told["phases"], "total": told["total"]}


def prepared(model: str, folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """What is started, by its kind; tells how long making it took, where it is wanted."""
    if args.kinds == "model":
        return {"model": model}
    limits = ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []
    checkpoint, engine = str(folder / "checkpoint"), str(folder / "engine")
    note(f"convert: {command('convert', model, checkpoint):.1f} s")
    built = command("build", checkpoint, engine, "--device", args.device, *limits)
    note(f"build: {built:.1f} s")
    return {"model": model, "checkpoint": checkpoint, "engine": engine}


def starts(
    models: dict[str, str], folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """One start after the other, until `--repeats` are done or `--limit` is near."""
    limits = {"max_model_len": args.max_model_len} if args.max_model_len else {}
    cache, longest = folder / "cache", 0.0
    for _ in range(args.repeats):
        for kind in args.kinds.split(","):
            shutil.rmtree(cache, ignore_errors=True)
            files = weight_files(models[kind])
            # An engine knows its limits, and plans its memory by them where nobody says others.
            settings = {"device": args.device, **({} if kind == "engine" else limits)}
            for state in ("cold", "warm"):
                if time.perf_counter() + 1.2 * longest > args.until:
                    note("no time is left for more starts")
                    return
                if args.page_cache == "cold":
                    evict(files)
                else:
                    read_rate(files)
                begin = time.perf_counter()
                there = resident(files)
                phases = one_start(models[kind], settings, cache)
                longest = max(longest, time.perf_counter() - begin)
                note(f"{kind}, {state}: {phases['total']:.2f} s, files in memory: {there}")
                yield f"{kind}, {state}", phases


def note(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians by start and phase."""
    phases = list(dict.fromkeys(name for each in found.values() for one in each for name in one))
    heads = ["start", *(name for name in phases if name != "total"), "total"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for start, each in found.items():
        medians = [statistics.median(one.get(name, 0.0) for one in each) for name in heads[1:]]
        lines.append(f"| {start} | {' | '.join(f'{value:.2f}' for value in medians)} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what is started")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--page-cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--work", type=Path, help="where checkpoint and engine are made")
    parser.add_argument("--limit", type=float, default=3600, help="seconds, roughly")
    parser.add_argument("--out", type=Path, help="a file for every single start, as JSON")
    args = parser.parse_args()
    args.until = time.perf_counter() + args.limit
    return args


def main() -> None:
    """Measures."""
    args = arguments()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as made:
        models = prepared(args.model, Path(made), args)
        for name, phases in starts(models, Path(made), args):
            found.setdefault(name, []).append(phases)
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
