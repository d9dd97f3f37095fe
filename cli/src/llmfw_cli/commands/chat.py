"""`llmfw chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, ModelOption, ServingOptions
from llmfw_cli.output import note, write
from llmfw_cli.printing import tell_speed
from llmfw_cli.sampling_options import SamplingOptions
from llmfw_cli.session import Session, open_session

if TYPE_CHECKING:
    from llmfw import SamplingParams

HELP = "/reset forgets the conversation, /exit or end of input leaves, Ctrl-C stops an answer"


@takes_groups
def chat(
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    system: Annotated[
        str | None, typer.Option(help="System message.", rich_help_panel="Prompt")
    ] = None,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Talk to a model, which remembers the conversation.

    Each line of standard input is a message. Answers go to standard output, everything else to
    standard error, so that a conversation can be piped. /reset forgets the conversation, /exit
    leaves, Ctrl-C stops an answer.
    """
    params = sampling.params()
    use = sampling.use_generation_config
    with open_session(model, serving, engine, use_generation_config=use) as session:
        _converse(session, params, system)


def _converse(session: Session, params: SamplingParams, system: str | None) -> None:
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)
    while (line := _read(interactive)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.strip():
            messages = _turn(session, params, messages, line, interactive)


def _read(interactive: bool) -> str | None:
    """The next message; None at the end of input."""
    if interactive and sys.stdout.isatty():
        return _edited()
    if interactive:
        note("> ")
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _edited() -> str | None:
    """A line from the terminal, with editing and history where Python has them."""
    with suppress(ImportError):
        import readline  # noqa: F401
    try:
        return input("> ")
    except EOFError:
        write("\n")
        return None


def _turn(
    session: Session,
    params: SamplingParams,
    messages: list[dict[str, str]],
    line: str,
    interactive: bool,
) -> list[dict[str, str]]:
    """Answer one message; the conversation with message and answer.

    A message that cannot be served is told of and forgotten, where somebody can ask again.
    """
    from llmfw.errors import RequestError

    asked = [*messages, {"role": "user", "content": line}]
    try:
        text = _answer(session, params, asked)
    except RequestError as error:
        if not interactive:
            raise
        note(f"error: {error}")
        return messages
    return [*asked, {"role": "assistant", "content": text}]


def _answer(session: Session, params: SamplingParams, messages: list[dict[str, str]]) -> str:
    """Stream the answer; Ctrl-C ends it early and what was said so far counts."""
    last = None
    stream = session.llm.stream(session.llm.chat_token_ids(messages), params)
    try:
        for last in stream:
            write(last.outputs[0].text_diff)
    except KeyboardInterrupt:
        if last is None or not sys.stdin.isatty():
            raise
        session.llm.abort(last.request_id)
    write("\n")
    if last is None:
        return ""
    tell_speed(last)
    return last.outputs[0].text
