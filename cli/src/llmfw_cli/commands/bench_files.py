"""`llmfw bench startup`, `make-checkpoint` and `chart`: what has to do with files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmfw_cli.bench.subject import SubjectOptions
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import note


@takes_groups
def startup(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    runs: Annotated[
        int, typer.Option(min=1, help="Processes of each kind; the median counts.")
    ] = 3,
    page_cache: Annotated[
        str,
        typer.Option(help="cold (weights evicted from memory first), warm (read first) or both."),
    ] = "both",
    fresh_kernels: Annotated[
        bool,
        typer.Option(
            "--fresh-kernels", help="An empty cache of kernels and tunings for each process."
        ),
    ] = False,
    json: JsonOption = False,
    *,
    engine: EngineOptions,
) -> None:
    """From the start of a process to its first token, by phase; a fresh process for each run."""
    from llmfw.errors import UsageError
    from llmfw_cli.bench.machine import hardware
    from llmfw_cli.bench.report import report_starts
    from llmfw_cli.bench.startup import measure_start, weight_files
    from llmfw_cli.session import llm_arguments
    from llmfw_cli.versions import versions

    kinds = {"both": ("cold", "warm"), "cold": ("cold",), "warm": ("warm",)}
    if page_cache not in kinds:
        raise UsageError(f"--page-cache {page_cache!r} is not known", hint="cold, warm or both")
    with subject.resolved(engine) as (model, settings, name):
        files = weight_files(model) if settings.load_format != "dummy" else []
        arguments = llm_arguments(serving, settings, with_tokenizer=settings.tokenizer is not None)
        starts = list(
            measure_start(
                model,
                arguments,
                files,
                runs=runs,
                kinds=kinds[page_cache],
                fresh_kernels=fresh_kernels,
            )
        )
    import torch

    about = {"model": name, **starts[0].about, "versions": versions()}
    about["hardware"] = hardware(torch.device(str(about["device"])))
    report_starts(starts, about, as_json=json)


@takes_groups
def make_checkpoint(
    common: CommonOptions,
    config: Annotated[Path, typer.Argument(help="A config.json or its directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    shard_size: Annotated[
        str, typer.Option(help='Most bytes of a file: a number or e.g. "5GiB".')
    ] = "5GiB",
    seed: Annotated[int, typer.Option(help="Of the values.")] = 0,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint of random weights for any config.json, to measure loading with.

    The values go out as a stream: memory never holds more than a piece of one tensor.
    """
    from llmfw.engine.settings import parse_memory
    from llmfw.errors import UsageError
    from llmfw.ops.kernel import DTYPE_NAMES
    from llmfw_cli.bench.checkpoint import write_random_checkpoint
    from llmfw_cli.output import progress, write, write_json

    size = parse_memory(int(shard_size) if shard_size.isdecimal() else shard_size)
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype {dtype!r} is not known", hint=", ".join(DTYPE_NAMES))
    with progress("writing") as advance:
        written = write_random_checkpoint(
            config,
            directory,
            dtype=DTYPE_NAMES[dtype],
            shard_bytes=int(size or 0),
            seed=seed,
            progress=advance,
        )
    if json:
        write_json({"directory": str(directory), **vars(written)})
        return
    files = "1 file" if written.files == 1 else f"{written.files} files"
    write(f"{directory}: {written.tensors} tensors, {written.nbytes / 1e9:.3f} GB in {files}\n")


@takes_groups
def chart(
    common: CommonOptions,
    results: Annotated[Path, typer.Argument(help="JSON with decode steps, of any benchmark.")],
    target: Annotated[Path, typer.Argument(help="The file to draw into: .png, .svg or .pdf.")],
    title: Annotated[str, typer.Option(help="Over the chart.")] = "",
) -> None:
    """Draw decode time against batch size, beside the floor, from JSON that is there already."""
    from llmfw.config.reading import read_json
    from llmfw_cli.bench.chart import draw, series_in

    document = read_json(results)
    draw(list(series_in(document)), title or str(document.get("gpu", results.stem)), target)
    note(f"drawn into {target}")
