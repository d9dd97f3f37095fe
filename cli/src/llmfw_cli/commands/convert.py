"""`llmfw convert`: a model's weights, ready for its modules, in a directory of our own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_distribution, complete_extension, complete_model
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import note, progress, write, write_json

if TYPE_CHECKING:
    from llmfw.models.convert import ConvertReport

PluginOption = Annotated[
    str | None,
    typer.Option(
        help="Distribution that must serve the model.", autocompletion=complete_distribution
    ),
]
PluginModuleOption = Annotated[
    list[str] | None,
    typer.Option(help="File or module that registers a model; may be given several times."),
]
ExtensionOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Installed extension to switch on; may be given several times.",
        autocompletion=complete_extension,
    ),
]

NoFallbackOption = Annotated[
    bool,
    typer.Option(
        "--no-fallback",
        envvar="LLMFW_NO_FALLBACK",
        help="Only a plugin that names the architecture may serve it.",
    ),
]


@takes_groups
def convert(
    common: CommonOptions,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar="LLMFW_MODEL",
            help="Hugging Face directory, GGUF file, hub id or alias.",
            autocompletion=complete_model,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (each tensor's own, packed ones as they are), float32, bfloat16 or float16."
        ),
    ] = "auto",
    tp: Annotated[
        int, typer.Option("--tp", min=1, help="Tensor-parallel ranks: one file each.")
    ] = 1,
    pp: Annotated[
        int, typer.Option("--pp", min=1, help="Pipeline stages; only 1 is served so far.")
    ] = 1,
    quantize: Annotated[
        str | None,
        typer.Option(help="How to quantise the weights; only none is served so far."),
    ] = None,
    keep_ignored: Annotated[
        bool,
        typer.Option(
            "--keep-ignored/--drop-ignored",
            help="Whether tensors that the model does not take are kept for an export.",
        ),
    ] = True,
    plugin: PluginOption = None,
    plugin_module: PluginModuleOption = None,
    extension: ExtensionOption = None,
    no_fallback: NoFallbackOption = False,
    json: JsonOption = False,
) -> None:
    """Write a model as a checkpoint of our own: fused, cut and checksummed, one file a rank.

    Tensors stream through one at a time. A run that was killed is gone on with by the same command;
    the directory appears whole or not at all. `llmfw run` takes it as it takes any model, `llmfw
    export` gives back what it was made from.
    """
    from llmfw.config import Mapping
    from llmfw.errors import UsageError
    from llmfw.models.convert import convert_checkpoint
    from llmfw.weights.staging import staging_path

    if quantize not in (None, "none"):
        raise UsageError(
            f"--quantize {quantize}: weights are not quantised here yet",
            hint="leave it out: what the model brings packed (MXFP4, float8) stays packed, and "
            "--dtype bfloat16 halves float32",
        )
    mapping = Mapping(world_size=tp * pp, tp_size=tp, pp_size=pp)
    note(f"converting {model} into {out}")
    try:
        with progress("converting") as advance:
            report = convert_checkpoint(
                model,
                out,
                dtype=dtype,
                mapping=mapping,
                keep_ignored=keep_ignored,
                progress=advance,
                **plugin_arguments(plugin, plugin_module, extension, no_fallback),
            )
    except KeyboardInterrupt:
        if staging_path(out).is_dir():
            note(f"stopped; the same command goes on from what is in {staging_path(out)}")
        raise
    _tell(report)
    if json:
        write_json(_facts(report))
    else:
        write(f"{report.path}\n")


def plugin_arguments(
    plugin: str | None,
    plugin_module: list[str] | None,
    extension: list[str] | None,
    no_fallback: bool,
) -> dict[str, Any]:
    """The arguments of `prepare_model` that say what serves the model."""
    from llmfw.plugins.switches import read_list

    return {
        "plugin": plugin,
        "plugin_modules": tuple(plugin_module or ()),
        "extensions": (*read_list("LLMFW_EXTENSIONS"), *(extension or ())),
        "fallback": not no_fallback,
    }


def _tell(report: ConvertReport) -> None:
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    note(
        f"{report.tensors} tensors{resumed}, {report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s"
    )
    for step in report.config.lossy:
        note(f"lossy ({step.step}): {step.detail}")
    if report.config.left_behind:
        note(f"left behind: {', '.join(report.config.left_behind)}")


def _facts(report: ConvertReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "resumed": report.resumed,
        "seconds": round(report.seconds, 3),
        "dtype": report.config.dtype,
        "lossy": [vars(step) for step in report.config.lossy],
        "left_behind": list(report.config.left_behind),
    }
