"""Outputs of requests as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmfw_cli.session import Session

if TYPE_CHECKING:
    from llmfw import CompletionOutput, RequestOutput
    from llmfw.request import Logprob


def completion_json(output: CompletionOutput) -> dict[str, Any]:
    """One completion."""
    value: dict[str, Any] = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": None if output.finish_reason is None else str(output.finish_reason),
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        value["logprobs"] = [_by_token(step) for step in output.logprobs]
    return value


def _by_token(step: Mapping[int, Logprob] | None) -> dict[str, float] | None:
    """Log probabilities by token id; None for a prompt's first token, which nothing precedes."""
    return None if step is None else {str(token): each.logprob for token, each in step.items()}


def _prompt_json(request: RequestOutput) -> dict[str, Any]:
    if request.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": [_by_token(step) for step in request.prompt_logprobs]}


def one_result(request: RequestOutput, session: Session) -> dict[str, Any]:
    """The object for one prompt with one completion."""
    return {
        **completion_json(request.outputs[0]),
        "prompt_tokens": len(request.prompt_token_ids),
        **_prompt_json(request),
        "timings": timings([request], session),
        **session.about(),
    }


def all_results(requests: list[RequestOutput], session: Session) -> dict[str, Any]:
    """The object for several prompts or completions: a list of outputs, in the order asked for."""
    outputs: list[dict[str, Any]] = []
    for number, request in enumerate(requests):
        for output in request.outputs:
            value = {"prompt_index": number, "index": output.index, **completion_json(output)}
            value |= _prompt_json(request)
            if request.error is not None:
                value["error"] = request.error.message
            outputs.append(value)
    prompt_tokens = [len(request.prompt_token_ids) for request in requests]
    return {
        "outputs": outputs,
        "prompt_tokens": prompt_tokens,
        "timings": timings(requests, session),
        **session.about(),
    }


def timings(requests: list[RequestOutput], session: Session) -> dict[str, Any]:
    """Seconds of loading and answering, and tokens a second after the first token."""
    arrival = min(request.timings.arrival for request in requests)
    firsts = [r.timings.first_token for r in requests if r.timings.first_token is not None]
    ends = [r.timings.finished for r in requests if r.timings.finished is not None]
    tokens = sum(len(output.token_ids) for request in requests for output in request.outputs)
    value: dict[str, Any] = {"load_s": round(session.load_seconds, 4), "output_tokens": tokens}
    if firsts and ends:
        first, end = min(firsts) - arrival, max(ends) - arrival
        value["time_to_first_token_s"] = round(first, 4)
        value["total_s"] = round(end, 4)
        if end > first:
            value["decode_tokens_per_s"] = round((tokens - 1) / (end - first), 2)
    return value
