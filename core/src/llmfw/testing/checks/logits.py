"""Are the logits the reference's, whole, in chunks, step by step and in any batch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmfw.errors import WeightError
from llmfw.models import PretrainedModel
from llmfw.testing.checks.weights import misfit
from llmfw.testing.compare import logits_tolerance, require_same_logits
from llmfw.testing.divergence import diagnose
from llmfw.testing.failure import CheckFailure
from llmfw.testing.packed import PackedSession
from llmfw.testing.subject import Subject

FAINT_TOLERANCE = 1e-3
"""Of the largest logit, where the weights are faint."""

CACHE = (
    "the attention layer: which slots it writes, which keys and positions it uses when only some "
    "tokens of a request are new; or the recurrent layer: what it reads from its state and leaves "
    "there"
)
BATCH = (
    "operations that mix tokens of different requests: the first dimension holds all tokens of "
    "the batch, a request is not a dimension of its own"
)


def model_of(subject: Subject, weights: str = "plain") -> PretrainedModel[Any]:
    """Ours, loaded.

    Raises:
        CheckFailure: If its weights do not load.
    """
    try:
        return subject.model(weights)
    except WeightError as exc:
        raise misfit(exc) from exc


def matches_reference(subject: Subject) -> None:
    """A prefill of several prompts gives the reference's logits at every position.

    Once with weights of usual size and once with faint ones, where eps in the norms decides.

    Raises:
        CheckFailure: Naming prompt, position, token and the first module that differs.
    """
    for weights in ("plain", "faint"):
        model = model_of(subject, weights)
        got = PackedSession(model, num_blocks=256).step(
            {str(number): ids for number, ids in enumerate(subject.prompts)}
        )
        for number, ids in enumerate(subject.prompts):
            expected = subject.expected(ids, weights)
            allowed = logits_tolerance(expected, None if weights == "plain" else FAINT_TOLERANCE)
            try:
                require_same_logits(
                    got[str(number)],
                    expected,
                    problem="prefill logits differ from the reference's",
                    where=f"prompt {number} ({len(ids)} tokens, {weights} weights)",
                    tolerance=allowed,
                )
            except CheckFailure as failure:
                batch = {str(n): prompt for n, prompt in enumerate(subject.prompts)}
                raise explained(failure, subject, weights, [batch], str(number)) from None


def explained(
    failure: CheckFailure,
    subject: Subject,
    weights: str,
    steps: Sequence[dict[str, list[int]]],
    name: str,
) -> CheckFailure:
    """The failure with the first module whose activations differ from the reference's."""
    found = diagnose(subject, weights, steps, name)
    if found is not None:
        advice = failure.facts.pop("look at", None)
        look = found.explain() + (f"\n{advice}" if advice else "")
        failure.facts = {"module": found.where, **failure.facts, "look at": look}
    return failure


def step_by_step(subject: Subject) -> None:
    """Tokens fed one at a time give the logits of one prefill.

    Raises:
        CheckFailure: Naming the first step that differs.
    """
    count = len(subject.prompts[0])
    for sizes in ([count // 2, *[1] * count], [1] * count):
        _in_pieces(subject, sizes, "decoding step by step")


def chunked_prefill(subject: Subject) -> None:
    """A prompt in chunks of unequal size gives the logits of one prefill.

    Raises:
        CheckFailure: Naming the chunk.
    """
    count = len(subject.prompts[0])
    for sizes in ([3] * count, [count // 2 + 1, count], [7, 2, 5, *[4] * count]):
        _in_pieces(subject, sizes, f"prefill in chunks of {', '.join(map(str, sizes[:3]))}, ...")


def _in_pieces(subject: Subject, sizes: Sequence[int], what: str) -> None:
    model = model_of(subject)
    ids = subject.prompts[0]
    whole = PackedSession(model).step({"whole": ids})["whole"]
    session = PackedSession(model)
    steps: list[dict[str, list[int]]] = []
    start = 0
    for size in sizes:
        piece = ids[start : start + size]
        if not piece:
            break
        steps.append({"pieces": piece})
        try:
            require_same_logits(
                session.step(steps[-1])["pieces"],
                whole[start : start + len(piece)],
                problem=f"{what} differs from one prefill",
                where=f"tokens {start} to {start + len(piece) - 1} of a prompt of {len(ids)}",
                tolerance=logits_tolerance(whole),
                look=CACHE,
            )
        except CheckFailure as failure:
            raise explained(failure, subject, "plain", steps, "pieces") from None
        start += len(piece)


def ragged_batch(subject: Subject) -> None:
    """Requests of unequal lengths, prefilling and decoding in one batch, get what each gets alone.

    Raises:
        CheckFailure: Naming the request.
    """
    model = model_of(subject)
    prompts = {str(number): ids for number, ids in enumerate(subject.prompts)}
    alone = {name: PackedSession(model).step({name: ids})[name] for name, ids in prompts.items()}
    steps = ragged_steps(prompts)
    session = PackedSession(model, num_blocks=256)
    at = dict.fromkeys(prompts, 0)
    for number, batch in enumerate(steps):
        for name, got in session.step(batch).items():
            start, at[name] = at[name], at[name] + len(got)
            try:
                require_same_logits(
                    got,
                    alone[name][start : at[name]],
                    problem="a request in a ragged batch differs from the same request alone",
                    where=f"request {name}, tokens {start} to {at[name] - 1}, in a batch of "
                    f"{[len(ids) for ids in batch.values()]} tokens",
                    tolerance=logits_tolerance(alone[name]),
                    look=BATCH,
                )
            except CheckFailure as failure:
                raise explained(failure, subject, "plain", steps[: number + 1], name) from None


def ragged_steps(prompts: Mapping[str, list[int]]) -> list[dict[str, list[int]]]:
    """Batches in which some requests prefill, whole or in part, while others decode."""
    names = list(prompts)
    first = {name: prompts[name][: len(prompts[name]) // 2] for name in names[::2]}
    done = {name: len(ids) for name, ids in first.items()}
    second = {name: prompts[name][done.get(name, 0) :][:1] for name in names[::2]}
    second |= {name: prompts[name][: -len(prompts[name]) // 3] for name in names[1::2]}
    for name, ids in second.items():
        done[name] = done.get(name, 0) + len(ids)
    third = {name: prompts[name][done[name] :] for name in names}
    steps = [first, second, third]
    return [{name: ids for name, ids in step.items() if ids} for step in steps if step]
