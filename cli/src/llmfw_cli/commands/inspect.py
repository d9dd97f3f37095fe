"""`llmfw inspect`: what a model is, who serves it, and how its weights would be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_model
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import write, write_facts, write_json

if TYPE_CHECKING:
    from llmfw.models import PreparedModel
    from llmfw.weights import LoadPlan


@takes_groups
def inspect(
    common: CommonOptions,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar="LLMFW_MODEL",
            help="Directory, GGUF file, hub id or alias.",
            autocompletion=complete_model,
        ),
    ],
    serving: ServingOptions,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Show where each parameter's values come from."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show a model's configuration and plugin; with --weights, the plan of loading it.

    Nothing of the weights is read but the headers of their files.
    """
    from llmfw.models import prepare_model

    prepared = prepare_model(model, **serving.arguments())
    plan = _plan(prepared) if weights else None
    facts = _facts(prepared)
    if json:
        write_json({**facts, "config": prepared.raw_config, **_plan_json(plan)})
        return
    write_facts(facts)
    write("\nconfig.json\n")
    write_facts({key: _brief(value) for key, value in prepared.raw_config.items()}, indent="  ")
    if plan is not None:
        write(f"\nweights\n{plan.render()}\n")


def _facts(prepared: PreparedModel) -> dict[str, Any]:
    config = prepared.model_config
    return {
        "model": prepared.source.name,
        "path": str(prepared.source.checkpoint_path),
        "kind": prepared.source.kind,
        "architecture": prepared.architecture,
        "plugin": prepared.plugin_label,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": str(config.device),
        "kernel packs": ", ".join(sorted({kernel.pack for kernel in config.ops.kernels})) or "none",
    }


def _plan(prepared: PreparedModel) -> LoadPlan:
    from llmfw.models import build
    from llmfw.models.plans import open_weights, plan_of

    model = build(prepared.model_config, prepared.host)
    return plan_of(prepared, model, open_weights(prepared))


def _plan_json(plan: LoadPlan | None) -> dict[str, Any]:
    return {} if plan is None else {"weights": [vars(row) for row in plan.rows()]}


def _brief(value: Any) -> str:
    """Long values cut to a line."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
