"""The options that commands share: what is run, what serves it, what is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from llmfw_cli import logs
from llmfw_cli.completions import complete_distribution, complete_extension, complete_model
from llmfw_cli.groups import OptionGroup

MODEL, OUTPUT = "Model", "Output"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)
]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="LLMFW_MODEL",
        help="Directory, GGUF file, hub id or alias.",
        autocompletion=complete_model,
        rich_help_panel=MODEL,
    ),
]


@dataclass(frozen=True)
class CommonOptions(OptionGroup):
    """What every command takes."""

    log_level: Annotated[
        logs.Level,
        typer.Option(envvar="LLMFW_LOG_LEVEL", help="What is logged.", rich_help_panel=OUTPUT),
    ] = logs.Level.warning
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", envvar="LLMFW_QUIET", help="No progress.", rich_help_panel=OUTPUT
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="LLMFW_DEBUG", help="Show tracebacks.", rich_help_panel=OUTPUT
        ),
    ] = False

    def apply(self) -> None:
        """Set up logging and remember whether tracebacks are wanted."""
        logs.set_up(self.log_level, debug=self.debug, quiet=self.quiet)


@dataclass(frozen=True)
class ServingOptions(OptionGroup):
    """What serves the model, in which precision and where."""

    dtype: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_DTYPE",
            help="auto, float32, bfloat16 or float16.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL
        ),
    ] = "auto"
    plugin: Annotated[
        str | None,
        typer.Option(
            help="Distribution that must serve the model; LLMFW_PREFER only prefers one.",
            autocompletion=complete_distribution,
            rich_help_panel=MODEL,
        ),
    ] = None
    plugin_module: Annotated[
        list[str] | None,
        typer.Option(
            help="File or module that registers a model; may be given several times. "
            "LLMFW_PLUGIN_MODULES names more.",
            rich_help_panel=MODEL,
        ),
    ] = None
    no_fallback: Annotated[
        bool,
        typer.Option(
            "--no-fallback",
            envvar="LLMFW_NO_FALLBACK",
            help="Only a plugin that names the architecture may serve it.",
            rich_help_panel=MODEL,
        ),
    ] = False
    extension: Annotated[
        list[str] | None,
        typer.Option(
            help="Installed extension to switch on; may be given several times. "
            "LLMFW_EXTENSIONS names more.",
            autocompletion=complete_extension,
            rich_help_panel=MODEL,
        ),
    ] = None
    kernels: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_KERNELS",
            help="auto, reference, or packs and kernels to take or (-name) to leave out.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    attn_backend: Annotated[
        str,
        typer.Option(
            "--attention-backend",
            "--attn-backend",
            envvar="LLMFW_ATTN_BACKEND",
            help="auto, or a backend's name: vanilla is torch alone.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LLM` and of `prepare_model` that these options set."""
        from llmfw.plugins.switches import read_list

        return {
            "dtype": self.dtype,
            "device": self.device,
            "plugin": self.plugin,
            "plugin_modules": tuple(self.plugin_module or ()),
            "fallback": not self.no_fallback,
            "extensions": (*read_list("LLMFW_EXTENSIONS"), *(self.extension or ())),
            "kernels": self.kernels,
            "attn_backend": self.attn_backend,
        }
