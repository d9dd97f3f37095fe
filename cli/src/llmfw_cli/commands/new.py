"""`llmfw new`: write a plugin for a model, from answers or from its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import write, write_json

if TYPE_CHECKING:
    from llmfw_cli.new.recognise import Recognition
    from llmfw_cli.new.settle import Settled


@takes_groups
def new(
    common: CommonOptions,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The model's name, such as MyModel.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Checkpoint whose config.json and headers tell what the model is made of.",
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Architecture in config.json; NAMEForCausalLM when left out.")
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(help="Name of the distribution; NAME-plugin when left out.")
    ] = None,
    import_name: Annotated[
        str | None, typer.Option(help="Name of the package that is imported.")
    ] = None,
    author: Annotated[str | None, typer.Option(help="Whom the licence names.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="decoder (the stock decoder, described) or blank (layers of its own)."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="transformers (its configuration class) or own (one in the plugin)."),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="model_type in config.json; llama when left out.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder that the plugin's folder goes into.")] = Path(
        "."
    ),
    trial: Annotated[
        bool,
        typer.Option(
            help="With --from: try what cannot be read against transformers on a tiny model."
        ),
    ] = True,
    json: JsonOption = False,
) -> None:
    """Write a new plugin: a distribution that installs, passes its tests and generates.

    On a terminal it asks what no option tells.
    """
    from llmfw_cli.new.answers import check
    from llmfw_cli.new.render import render

    given = {
        "model_name": name,
        "architecture": architecture,
        "distribution": distribution,
        "import_name": import_name,
        "author": author,
        "base": base,
        "config": config,
        "model_type": model_type,
    }
    answers = {key: value for key, value in given.items() if value is not None}
    told: dict[str, Any] = {}
    if source is not None:
        found, told = _look_at(source, trial)
        answers = {**found, **answers}
    elif _is_terminal() and not json:
        answers = _ask(answers)
    _require_name(answers)
    target = render(check(answers), output)
    _tell(target, told, source, json)


def _look_at(source: str, trial: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """The answers that a checkpoint gives, and a report of what it tells."""
    from llmfw_cli.new import write as writing
    from llmfw_cli.new.recognise import recognise
    from llmfw_cli.new.settle import Settled, settle

    found = recognise(source)
    settled = settle(found) if trial else Settled(found, None, "--no-trial")
    told = writing.report(settled, _problems(settled, source))
    answers = writing.answers_of(settled.found)
    return {**answers, "__notes": writing.notes(told)}, told


def _problems(settled: Settled, source: str) -> str:
    """What stands in the way of loading the checkpoint with what was recognised."""
    from llmfw.errors import LlmfwError
    from llmfw.weights import open_checkpoint, resolve_model
    from llmfw_cli.new.trial import plan

    found: Recognition = settled.found
    try:
        plan(found, open_checkpoint(resolve_model(source).checkpoint_path))
    except LlmfwError as error:
        return error.message
    return ""


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _ask(answers: dict[str, str]) -> dict[str, str]:
    """Ask for what is not given, each with its default."""
    from llmfw_cli.new.answers import ASKED, choices, default, question

    for name in ASKED:
        if name in answers:
            continue
        known = choices(name)
        asked = f"{question(name)} ({', '.join(known)})" if known else question(name)
        answers[name] = str(typer.prompt(asked, default=default(name, answers), err=True))
    return answers


def _require_name(answers: dict[str, str]) -> None:
    from llmfw.errors import UsageError

    if "model_name" not in answers:
        raise UsageError(
            "what is the model called?",
            hint="llmfw new NAME, or llmfw new --from DIR for a plugin from a checkpoint",
        )


def _tell(target: Path, told: dict[str, Any], source: str | None, json: bool) -> None:
    from llmfw_cli.new import write as writing

    if json:
        write_json({"path": str(target), **told})
        return
    for line in writing.lines(told) if told else ():
        write(line + "\n")
    write(f"\nwritten to {target}; next:\n" if told else f"written to {target}; next:\n")
    write(f'  pip install -e "{target}[test]"\n')
    write(f"  pytest {target}\n")
    if source is not None:
        write(f"  llmfw verify {source}\n")
