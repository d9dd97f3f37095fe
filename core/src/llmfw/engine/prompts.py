"""Prompts as callers give them: text, token ids, or a mapping with one of these; one or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from llmfw.errors import LlmfwError, RequestError
from llmfw.request import CompletionOutput, FinishReason, RequestOutput

if TYPE_CHECKING:
    from llmfw.engine.tokenizer import Tokenizer

#: {"prompt": text} or {"prompt_token_ids": ids} say the same as text or ids alone.
Prompt = str | Sequence[int] | Mapping[str, Any]

_HINT = "a prompt is a string or a list of token ids"


def as_batch(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether it was a single one.

    A list that holds a string, list or mapping is many prompts; one of numbers is a single prompt.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    listed = _listed(prompts)
    if listed is None:
        raise RequestError(f"a prompt is a {type(prompts).__name__}", hint=_HINT)
    if not listed or (not _all_int(listed) and any(_is_whole_prompt(item) for item in listed)):
        return listed, False
    return [listed], True


def token_ids_of(prompt: Any, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    """The text of a prompt, if it came as text, and its token ids.

    Raises:
        RequestError: If it is empty, or neither text nor whole numbers.
    """
    if isinstance(prompt, Mapping):
        prompt = _from_mapping(prompt)
    if isinstance(prompt, str):
        return prompt, _encode(prompt, tokenizer)
    listed = _listed(prompt)
    if listed is None:
        raise RequestError(f"a prompt is a {type(prompt).__name__}", hint=_HINT)
    if not listed:
        raise RequestError("the prompt is empty", hint="give at least one token id")
    return None, tuple(listed if _all_int(listed) else map(_token_id, listed))


def failed_output(request_id: str, prompt: Any, error: LlmfwError) -> RequestOutput:
    """The output of a request that was refused."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[],
        outputs=[CompletionOutput(0, finish_reason=FinishReason.ERROR)],
        finished=True,
        error=error,
    )


def _encode(text: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is None:
        raise RequestError(
            "the prompt is text, but there is no tokenizer (skip_tokenizer_init)",
            hint="give token ids, or leave skip_tokenizer_init off",
        )
    if not text:
        raise RequestError(
            "the prompt is empty", hint="give text, or token ids such as the BOS token's"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"the prompt is no valid text: {exc}", hint="decode its bytes with the right encoding"
        ) from exc
    ids = tuple(tokenizer.encode(text))
    if not ids:
        raise RequestError("the prompt has no tokens", hint="give text that the tokenizer knows")
    return ids


def _from_mapping(prompt: Mapping[str, Any]) -> Any:
    known = {"prompt", "prompt_token_ids"} & set(prompt)
    if len(prompt) != 1 or not known:
        raise RequestError(
            f"a prompt has the keys {sorted(prompt)}",
            hint='give {"prompt": text} or {"prompt_token_ids": ids}',
        )
    return prompt[known.pop()]


def _listed(value: Any) -> list[Any] | None:
    """A list of a list-like value: list, tuple, array or tensor."""
    if isinstance(value, (bytes, bytearray)):
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple, range)) else None


def _is_whole_prompt(item: Any) -> bool:
    """Whether an item is text, a mapping or list-like, and not a number."""
    return isinstance(item, (str, bytes, Mapping, list, tuple)) or bool(getattr(item, "shape", ()))


def _all_int(items: list[Any]) -> bool:
    """Whether all are Python's own whole numbers; without a step of Python for each."""
    return set(map(type, items)) == {int}


def _token_id(item: Any) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return index(item)
    except TypeError as exc:
        raise RequestError(
            f"{item!r} is not a token id", hint="token ids are whole numbers"
        ) from exc
