"""How `run` prints texts: alone, under a line that says which it is, or as the guide's lines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmfw_cli.output import write
from llmfw_cli.session import Session

if TYPE_CHECKING:
    from llmfw import RequestOutput, SamplingParams
    from llmfw.engine.generation import Generation
    from llmfw.errors import LlmfwError

logger = logging.getLogger("llmfw.cli")


class Layout(Protocol):
    """What stands around the texts."""

    def prompt(self, number: int, text: str) -> str:
        """What comes before the completions of prompt `number` (from 0)."""

    def before(self, number: int, index: int) -> str:
        """What comes before a completion."""

    def after(self) -> str:
        """What comes after one."""


class Bare:
    """One completion, and nothing else."""

    def prompt(self, number: int, text: str) -> str:
        """Nothing."""
        return ""

    def before(self, number: int, index: int) -> str:
        """Nothing."""
        return ""

    def after(self) -> str:
        """The end of the line."""
        return "\n"


class Headed(Bare):
    """Several completions, each under a line."""

    def before(self, number: int, index: int) -> str:
        """The line."""
        return f"--- prompt {number + 1}, completion {index + 1} ---\n"


class Labelled:
    """The lines of TensorRT-LLM's run.py."""

    def prompt(self, number: int, text: str) -> str:
        """Its line of a prompt."""
        return f'Input [Text {number}]: "{text}"\n'

    def before(self, number: int, index: int) -> str:
        """The beginning of its line of a completion."""
        return f'Output [Text {number} Beam {index}]: "'

    def after(self) -> str:
        """The end of it."""
        return '"\n'


def layout_for(*, labels: bool, several: bool) -> Layout:
    """The layout that a run's options and number of completions ask for."""
    if labels:
        return Labelled()
    return Headed() if several else Bare()


def print_texts(session: Session, requests: Sequence[RequestOutput], layout: Layout) -> None:
    """Print finished requests; a prompt that failed has no completion."""
    for number, request in enumerate(requests):
        write(layout.prompt(number, prompt_text(session, request)))
        for output in request.outputs:
            if request.error is None:
                write(layout.before(number, output.index) + output.text + layout.after())


def print_stream(
    session: Session, prompts: Sequence[Any], params: SamplingParams, layout: Layout
) -> list[RequestOutput]:
    """Answer all prompts at once and print their texts in order, each as it comes.

    Raises:
        LlmfwError: The first that a prompt failed with, when the others are answered.
    """
    from llmfw.errors import LlmfwError

    handles: list[Generation | LlmfwError] = []
    for prompt in prompts:
        try:
            handles.append(session.llm.generate_async(prompt, params, streaming=True))
        except LlmfwError as exc:
            handles.append(exc)
    requests: list[RequestOutput] = []
    errors: list[LlmfwError] = []
    for number, handle in enumerate(handles):
        try:
            if isinstance(handle, LlmfwError):
                raise handle
            requests.append(_print_one(session, number, handle, layout))
        except LlmfwError as exc:
            errors.append(exc)
    raise_first(errors)
    return requests


def _print_one(session: Session, number: int, handle: Generation, layout: Layout) -> RequestOutput:
    started = False
    for request in handle:
        if request.error is not None:
            raise request.error
        if not started:
            started = True
            write(layout.prompt(number, prompt_text(session, request)) + layout.before(number, 0))
        write(request.outputs[0].text_diff)
    write(layout.after())
    tell_speed(request)
    return request


def raise_first(errors: Sequence[LlmfwError]) -> None:
    """Log all errors but the first, which is raised."""
    for error in errors[1:]:
        logger.error("%s", error.message)
    if errors:
        raise errors[0]


def prompt_text(session: Session, request: RequestOutput) -> str:
    """A prompt as text, its token ids decoded where it came as these."""
    tokenizer = session.llm.tokenizer
    if request.prompt is not None or tokenizer is None:
        return request.prompt or ""
    return tokenizer.decode(list(request.prompt_token_ids))


def tell_speed(request: RequestOutput) -> None:
    """Log how long the answer took."""
    timings = request.timings
    first, total = timings.time_to_first_token, timings.total
    if first is None or total is None:
        return
    tokens = len(request.outputs[0].token_ids)
    speed = f", then {(tokens - 1) / (total - first):.1f} tokens/s" if total > first else ""
    logger.info("%d tokens in %.2f s; the first after %.2f s%s", tokens, total, first, speed)
