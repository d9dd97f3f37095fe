"""`llmfw export`: from a converted checkpoint back to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmfw_cli.commands.convert import (
    ExtensionOption,
    NoFallbackOption,
    PluginModuleOption,
    PluginOption,
    plugin_arguments,
)
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import note, progress, write, write_json


@takes_groups
def export(
    common: CommonOptions,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Directory that `llmfw convert` or `llmfw build` made."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    plugin: PluginOption = None,
    plugin_module: PluginModuleOption = None,
    extension: ExtensionOption = None,
    no_fallback: NoFallbackOption = False,
    json: JsonOption = False,
) -> None:
    """Give back the Hugging Face directory that a checkpoint was converted from.

    Unless something was lost on the way, every file of weights comes back byte for byte, which is
    proved by its digest; what was lost is told.
    """
    from llmfw.models.export import export_checkpoint

    note(f"exporting {checkpoint} into {out}")
    with progress("exporting") as advance:
        report = export_checkpoint(
            checkpoint,
            out,
            progress=advance,
            **plugin_arguments(plugin, plugin_module, extension, no_fallback),
        )
    same = "the source's, byte for byte" if report.identical else "not the source's"
    note(f"{report.tensors} tensors in {report.seconds:.1f} s; the files of weights are {same}")
    for step in report.lossy:
        note(f"lossy ({step.step}): {step.detail}")
    if json:
        write_json(
            {
                "path": str(report.path),
                "files": list(report.files),
                "tensors": report.tensors,
                "identical": report.identical,
                "lossy": [vars(step) for step in report.lossy],
                "seconds": round(report.seconds, 3),
            }
        )
    else:
        write(f"{report.path}\n")
