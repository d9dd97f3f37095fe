"""`llmfw eval`: benchmarks of the harness lm-eval."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, ModelOption, ServingOptions

TASKS = "Tasks"


@takes_groups
def evaluate(
    context: typer.Context,
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    tasks: Annotated[
        list[str],
        typer.Option(
            help="lm-eval's tasks, separated by commas; may be given several times.",
            rich_help_panel=TASKS,
        ),
    ],
    *,
    engine: EngineOptions,
) -> None:
    """Run tasks of lm-eval, which the extra `eval` of llmfw-cli brings, with the model.

    Every other option goes to `lm-eval run` as it is: --limit, --num_fewshot, --include_path,
    --apply_chat_template, --output_path, ... `python -m llmfw_cli.lm_eval` is lm-eval's own
    command, with `--model llmfw` among its models.
    """
    from llmfw_cli.lm_eval import NAME, evaluate

    # lm-eval records the arguments of a model, so it gets those that were set and no more.
    defaults = {**ServingOptions().arguments(), **EngineOptions().arguments()}
    settings = {**serving.arguments(), **engine.arguments()}
    told = {
        name: value
        for name, value in settings.items()
        if name != "device" and (name not in defaults or value != defaults[name])
    }
    if "attn_backend" in told:
        told["attention_backend"] = told.pop("attn_backend")
    about = json.dumps({"model": model, **told})
    chosen = ["--model", NAME, "--model_args", about, "--device", serving.device]
    evaluate(["run", *chosen, "--tasks", *tasks, *context.args])
