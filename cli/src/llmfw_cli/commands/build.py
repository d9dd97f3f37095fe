"""`llmfw build`: an engine directory, or with --dry-run what one would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_model
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import note, progress, write, write_facts, write_json, write_table

if TYPE_CHECKING:
    from llmfw.engine.build_engine import BuildReport
    from llmfw.engine.estimate import Estimate

LIMITS = "Engine"


@takes_groups
def build(
    common: CommonOptions,
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            envvar="LLMFW_MODEL",
            help="A converted checkpoint; any other model is converted on the way.",
            autocompletion=complete_model,
        ),
    ],
    serving: ServingOptions,
    engine: Annotated[
        Path | None,
        typer.Argument(metavar="ENGINE", help="The directory to make; none with --dry-run."),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy/--link", help="Copy the checkpoint into the engine, or link to it."),
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a sequence.", rich_help_panel=LIMITS),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help="Most sequences in flight.", rich_help_panel=LIMITS),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a step.", rich_help_panel=LIMITS)
    ] = None,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            help='Memory of the cache: bytes, "2GiB", or a fraction of what is free.',
            rich_help_panel=LIMITS,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell what it would take on --gpu, and build nothing."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --dry-run: a GPU by name, e.g. h100; it need not be there."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Start a model once and keep what the start has made: an engine directory.

    It holds the compiled kernels, tuning results, a memory plan and the checkpoint. `llmfw run
    --model ENGINE` then starts without compiling or measuring; what does not hold on another
    machine is left out, with one line that says why.
    """
    from llmfw.errors import UsageError
    from llmfw_cli.engine_options import memory_of

    limits: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_memory": memory_of(kv_cache_memory),
    }
    if dry_run:
        if gpu is None:
            raise UsageError("--dry-run needs a GPU", hint="name one: --gpu h100")
        _explain(model, gpu, serving.arguments(), limits, json)
        return
    if engine is None or gpu is not None:
        raise UsageError(
            "--gpu goes with --dry-run" if gpu else "where to? ENGINE is missing",
            hint="llmfw build CHECKPOINT ENGINE, or llmfw build MODEL --dry-run --gpu h100",
        )
    from llmfw.engine.build_engine import build_engine

    note(f"building {engine} from {model}")
    with progress("loading") as advance:
        report = build_engine(
            model, engine, copy=copy, progress=advance, **serving.arguments(), **limits
        )
    _tell(report)
    if json:
        write_json({"path": str(report.path), "seconds": report.seconds, **_facts(report)})
    else:
        write(f"{report.path}\n")


def _facts(report: BuildReport) -> dict[str, Any]:
    manifest = report.manifest
    compiled = [name for name in manifest.files if name.startswith("cache/kernels/")]
    return {
        "machine": vars(manifest.machine),
        "memory": vars(manifest.memory),
        "graphs": manifest.graphs.count,
        "kernel_files": len(compiled),
        "linked": manifest.linked,
    }


def _tell(report: BuildReport) -> None:
    manifest, memory = report.manifest, report.manifest.memory
    files = sum(name.startswith("cache/kernels/") for name in manifest.files)
    note(
        f"{memory.weights / 1e6:.1f} MB of weights, {memory.kv_cache / 1e6:.1f} MB of cache "
        f"({memory.num_blocks * memory.block_size} tokens); graphs: {manifest.graphs.count}; "
        f"files of kernels and timings: {files}"
    )
    note(", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items()))


def _explain(
    model: str, gpu: str, serving: dict[str, Any], limits: dict[str, Any], as_json: bool
) -> None:
    """Print what a model would take on a GPU."""
    from llmfw.engine.estimate import estimate
    from llmfw.engine.gpus import gpu_named
    from llmfw.engine.settings import EngineSettings

    for needless in ("device", "attn_backend"):
        serving.pop(needless)
    told = estimate(model, gpu_named(gpu), settings=EngineSettings(**limits), **serving)
    facts = _estimate_facts(told)
    kernels = [
        {"op": each.op, "shape": each.shape, "kernel": each.kernel, "not": list(each.reasons)}
        for each in told.kernels
    ]
    if as_json:
        write_json({"model": model, "gpu": gpu, **facts, "kernels": kernels})
        return
    shown = {name: value for name, value in facts.items() if value is not None}
    write_facts({name: _shown(name, value) for name, value in shown.items()})
    write("\n")
    rows = [[each.op, each.shape, each.kernel, "; ".join(each.reasons)] for each in told.kernels]
    write_table(("op", "shape", "kernel", "why no other"), sorted(rows))
    if told.no_graphs:
        note(f"no CUDA graphs: {told.no_graphs}")
    if not told.fits:
        note("it does not fit: not one sequence of the full length")


def _estimate_facts(told: Estimate) -> dict[str, Any]:
    return {
        "gpu_name": told.gpu.name,
        "gpu_memory_bytes": told.gpu.memory,
        "dtype": told.dtype,
        "weights_bytes": told.weights,
        "activations_bytes": told.activations,
        "state_bytes": told.state,
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "kv_cache_bytes": told.kv_cache,
        "kv_cache_tokens": told.kv_tokens,
        "max_model_len": told.max_model_len,
        "max_num_seqs": told.max_num_seqs,
        "full_length_sequences": told.full_sequences,
        "fits": told.fits,
        "tokens_per_second_at_most": told.tokens_per_second,
        "graphs": told.graphs.count,
        "graph_batch_sizes": list(told.graphs.batch_sizes),
        "no_graphs": told.no_graphs,
    }


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        big = value >= 1 << 30
        return f"{value / (1 << 30):.2f} GiB" if big else f"{value / (1 << 20):.1f} MiB"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
