"""`llmfw verify`: is a model right? Against transformers, stage by stage and module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_model
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import note, write, write_facts, write_json, write_table

if TYPE_CHECKING:
    from llmfw.testing.verify_report import VerifyReport

DIFFERENCE = 1

ReferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="Model to compare with, made from the configuration; transformers' when left out.",
    ),
]


@takes_groups
def verify(
    common: CommonOptions,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar="LLMFW_MODEL",
            help="Directory, GGUF file, hub id or alias; with --tiny also an architecture or a "
            "distribution.",
            autocompletion=complete_model,
        ),
    ],
    serving: ServingOptions,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="A tiny random model of its kind; no weights are read."),
    ] = False,
    reference: ReferenceOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts; not with --tiny.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each prompt.")] = 16,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep one of the two models in memory at a time.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Compare a model with transformers' and name the first module that differs.

    Tensor accounting, logits of a prefill, of cached decoding and of a batch, greedy tokens. Both
    run in float32 unless --dtype says otherwise. The exit code is 1 where something differs.
    """
    if tiny:
        reports = _tiny(model, serving, reference, max_tokens, low_memory=low_memory)
    else:
        from llmfw.testing.verify import verify_model

        arguments = serving.arguments()
        dtype = arguments.pop("dtype")
        report = verify_model(
            model,
            reference=reference,
            num_prompts=prompts,
            max_tokens=max_tokens,
            low_memory=low_memory,
            dtype="float32" if dtype == "auto" else dtype,
            **arguments,
        )
        reports = [report]
    if json:
        found = [report.as_dict() for report in reports]
        write_json(found[0] if len(found) == 1 else {"reports": found})
    else:
        for report in reports:
            show(report)
    if not all(report.passed for report in reports):
        raise typer.Exit(DIFFERENCE)


def show(report: VerifyReport) -> None:
    """Write a report as tables."""
    write_facts(report.facts)
    write("\n")
    rows = [list(row) for row in report.rows()]
    long = [row for row in rows if "\n" in row[4]]
    for row in long:
        row[4] = row[4].split("\n")[0]
    write_table(("stage", "outcome", "worst", "allowed", ""), rows)
    for stage in report.stages:
        if "\n" in stage.detail:
            write(f"\n{stage.name}: {stage.detail}\n")
    found = list(report.divergence_lines())
    if found:
        write("\n")
        width = max(len(name) for name, _ in found)
        for name, value in found:
            write(f"{name.ljust(width)}  {value}\n")
    write("\n")
    note(f"{report.seconds:.1f} s")


def tiny_settings(serving: ServingOptions) -> dict[str, Any]:
    """What `subjects_of` takes, from the options; tiny models run in float32.

    Raises:
        UsageError: For another dtype.
    """
    from llmfw.errors import UsageError
    from llmfw.plugins import load_plugin_module

    arguments = serving.arguments()
    if arguments["dtype"] not in ("auto", "float32", "fp32"):
        raise UsageError("tiny models run in float32", hint="leave --dtype out")
    for module in arguments["plugin_modules"]:
        load_plugin_module(module)
    settings = {"extensions": arguments["extensions"], "attn_backend": arguments["attn_backend"]}
    if arguments["kernels"] != "auto":
        settings["kernels"] = arguments["kernels"]
    device = "cpu" if arguments["device"] == "auto" else arguments["device"]
    return {"distribution": arguments["plugin"], "device": device, "settings": settings}


def _tiny(
    model: str, serving: ServingOptions, reference: str | None, max_tokens: int, *, low_memory: bool
) -> list[VerifyReport]:
    from llmfw.testing.selection import subjects_of
    from llmfw.testing.verify import verify_tiny

    reports = []
    for subject in subjects_of(model, reference=reference, **tiny_settings(serving)):
        with subject:
            reports.append(verify_tiny(subject, max_tokens=max_tokens, low_memory=low_memory))
    return reports
