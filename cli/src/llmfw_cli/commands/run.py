"""`llmfw run`: complete prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.inputs import read_prompts
from llmfw_cli.options import CommonOptions, JsonOption, ModelOption, ServingOptions
from llmfw_cli.output import write, write_json
from llmfw_cli.sampling_options import SamplingOptions
from llmfw_cli.session import Session, open_session

if TYPE_CHECKING:
    from llmfw import RequestOutput, SamplingParams

logger = logging.getLogger("llmfw.cli")

PROMPT = "Prompt"


@takes_groups
def run(
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts; - is standard input."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A prompt; - is standard input. May be given several times.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that is a prompt, in UTF-8. May be given several times.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Put each prompt into the chat template.", rich_help_panel=PROMPT
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="System message, with --chat.", rich_help_panel=PROMPT),
    ] = None,
    n: Annotated[
        int,
        typer.Option("--n", "-n", help="Completions for each prompt.", rich_help_panel=PROMPT),
    ] = 1,
    json: JsonOption = False,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Complete prompts.

    Without --prompt and --prompt-file, standard input is the prompt. The text streams to standard
    output; with --json one object is printed at the end, which has a list `outputs` where there are
    several.
    """
    texts = read_prompts([*(prompts or ()), *(prompt or ())], prompt_file or ())
    if system is not None and not chat:
        raise _system_without_chat()
    params = sampling.params(n=n)
    use = sampling.use_generation_config
    with open_session(model, serving, engine, use_generation_config=use) as session:
        inputs = [_ready(session, text, chat, system) for text in texts]
        if json or len(inputs) > 1 or n > 1:
            _answer_all(session, inputs, params, as_json=json)
        else:
            _stream(session, inputs[0], params)


def _ready(session: Session, text: str, chat: bool, system: str | None) -> str | list[int]:
    if not chat:
        return text
    messages = [{"role": "system", "content": system}] if system is not None else []
    return session.llm.chat_token_ids([*messages, {"role": "user", "content": text}])


def _stream(session: Session, prompt: str | list[int], params: SamplingParams) -> None:
    """Write the text as it comes, then end the line."""
    last: RequestOutput | None = None
    for last in session.llm.stream(prompt, params):
        write(last.outputs[0].text_diff)
    write("\n")
    if last is not None:
        tell_speed(last)


def tell_speed(request: RequestOutput) -> None:
    """Log how long the answer took."""
    timings = request.timings
    first, total = timings.time_to_first_token, timings.total
    if first is None or total is None:
        return
    tokens = len(request.outputs[0].token_ids)
    speed = f", then {(tokens - 1) / (total - first):.1f} tokens/s" if total > first else ""
    logger.info("%d tokens in %.2f s; the first after %.2f s%s", tokens, total, first, speed)


def _answer_all(
    session: Session, inputs: list[Any], params: SamplingParams, *, as_json: bool
) -> None:
    from llmfw_cli.results import all_results, one_result

    single = len(inputs) == 1
    answered = session.llm.generate(inputs[0] if single else inputs, params)
    requests = [answered] if not isinstance(answered, list) else answered
    if as_json and single and params.n == 1:
        write_json(one_result(requests[0], session))
    elif as_json:
        write_json(all_results(requests, session))
    else:
        _write_texts(requests)
    failed = [request.error for request in requests if request.error is not None]
    for error in failed[1:]:
        logger.error("%s", error.message)
    if failed:
        raise failed[0]


def _write_texts(requests: list[RequestOutput]) -> None:
    """Each completion under a line that says which it is."""
    for number, request in enumerate(requests, 1):
        for output in request.outputs:
            write(f"--- prompt {number}, completion {output.index + 1} ---\n{output.text}\n")


def _system_without_chat() -> Exception:
    from llmfw.errors import UsageError

    return UsageError("--system needs the chat template", hint="add --chat")
