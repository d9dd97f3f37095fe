"""Chat templates as lm-eval applies them: an answer may be begun, a system message left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import RequestError


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    """The prompt of a conversation.

    Args:
        tokenizer: It has the template.
        messages: With "role" and "content".
        add_generation_prompt: End with the opening of the assistant's turn. Otherwise the last
            message is an answer to be continued: what the template writes after it is left out.

    Raises:
        RequestError: If the template refuses the messages, with and without their system message.
    """
    try:
        return _render(tokenizer, messages, add_generation_prompt)
    except RequestError:
        fewer = [message for message in messages if message["role"] != "system"]
        if len(fewer) == len(messages):
            raise
        return _render(tokenizer, fewer, add_generation_prompt)


def _render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt
    )
    if add_generation_prompt:
        return text
    last = messages[-1]["content"]
    start = text.rfind(last.strip())
    if start < 0:
        raise RequestError(
            "the chat template changes the last message, so it cannot be continued",
            hint="use a task that does not begin the answer",
        )
    whole = text.startswith(last, start)
    return text[: start + len(last if whole else last.strip())]
