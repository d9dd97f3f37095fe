"""The options of `run` alone: how it prints, which files it writes, how it is looked into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmfw_cli.groups import OptionGroup

OUTPUT, INSIDE = "Output", "Profiling and debugging"


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Names are those of TensorRT-LLM's run.py where it has them."""

    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="Print lines as run.py of TensorRT-LLM does, Input and Output of each text and "
            "beam; without a prompt take its prompt.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Print text as it comes for several prompts, too; one alone always does.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    output_csv: Annotated[
        Path | None,
        typer.Option(
            help="Write token ids, prompt and completion, one line each.", rich_help_panel=OUTPUT
        ),
    ] = None
    output_npy: Annotated[
        Path | None,
        typer.Option(
            help="Write the same as an int32 table, padded with -1.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    output_logits_npy: Annotated[
        Path | None,
        typer.Option(
            metavar="NAME.npy",
            help="Write logits as float32: NAME_context.npy of the prompts' tokens and, without "
            "beams, NAME_generation.npy of those that were made.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    run_profiling: Annotated[
        bool,
        typer.Option(
            "--run-profiling",
            help="Answer again, warm-up and repeats, and tell latency and tokens a second.",
            rich_help_panel=INSIDE,
        ),
    ] = False
    profiling_repeats: Annotated[
        int,
        typer.Option(min=1, help="Repeats that --run-profiling measures.", rich_help_panel=INSIDE),
    ] = 10
    debug_mode: Annotated[
        bool,
        typer.Option(
            "--debug-mode",
            help="Write what modules give, step by step, to --debug-file.",
            rich_help_panel=INSIDE,
        ),
    ] = False
    debug_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules of --debug-mode, e.g. model.layers.*.mlp; all when left out. "
            "May be given several times.",
            rich_help_panel=INSIDE,
        ),
    ] = None
    debug_file: Annotated[
        Path,
        typer.Option(help="The .npz file of --debug-mode.", rich_help_panel=INSIDE),
    ] = Path("llmfw-debug.npz")
