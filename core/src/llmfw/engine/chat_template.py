"""Chat templates: the jinja2 environment in which transformers' templates run, sandboxed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from llmfw.errors import RequestError, TokenizerError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt that a template makes of messages.

    Raises:
        TokenizerError: If the template cannot be read.
        RequestError: If it refuses the messages.
    """
    import jinja2

    try:
        compiled = _compile(template)
    except jinja2.TemplateError as exc:
        raise TokenizerError(
            f"the chat template cannot be read: {exc}", hint="give another with chat_template=..."
        ) from exc
    try:
        return str(
            compiled.render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        )
    except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as exc:
        raise RequestError(
            f"the chat template refuses these messages: {exc}",
            hint='messages look like [{"role": "user", "content": "Hello"}]',
        ) from exc


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is just text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> list[nodes.Node]:
            """The nodes inside the block."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)  # type: ignore[no-any-return]

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_strftime_now: Callable[[str], str] = lambda pattern: datetime.now().strftime(pattern)  # noqa: E731
