"""Are the logits the reference's, whole, in chunks, step by step and in any batch?"""

from __future__ import annotations

from typing import Any

from llmfw.errors import WeightError
from llmfw.models import PretrainedModel
from llmfw.testing.checks.weights import misfit
from llmfw.testing.compare import logits_tolerance, require_same_logits
from llmfw.testing.failure import CheckFailure
from llmfw.testing.packed import PackedSession
from llmfw.testing.subject import Subject

FAINT_TOLERANCE = 1e-3
"""Of the largest logit, where the weights are faint."""

CACHE = (
    "the attention layer: which slots it writes, which keys and positions it uses when only some "
    "tokens of a request are new"
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
                raise _explained(failure, subject, weights, ids) from failure


def _explained(
    failure: CheckFailure, subject: Subject, weights: str, ids: list[int]
) -> CheckFailure:
    """The failure with the first module whose output differs."""
    from llmfw.testing.divergence import diagnose

    found = diagnose(subject, weights, ids)
    if found is None:
        failure.facts["look at"] = "no module's output alone differs: " + BATCH
        return failure
    failure.facts = {"module": found.where, **failure.facts, "look at": found.explain()}
    return failure


def step_by_step(subject: Subject) -> None:
    """Tokens fed one at a time give the logits of one prefill.

    Raises:
        CheckFailure: Naming the first step that differs.
    """
    model = model_of(subject)
    ids = subject.prompts[0]
    whole = PackedSession(model).step({"whole": ids})["whole"]
    session = PackedSession(model)
    for position, token in enumerate(ids):
        require_same_logits(
            session.step({"steps": [token]})["steps"],
            whole[position : position + 1],
            problem="decoding step by step differs from one prefill",
            where=f"step {position} (expected: the same position of a prefill)",
            tolerance=logits_tolerance(whole),
            look=CACHE,
        )


def chunked_prefill(subject: Subject) -> None:
    """A prompt in chunks of unequal size gives the logits of one prefill.

    Raises:
        CheckFailure: Naming the chunk.
    """
    model = model_of(subject)
    ids = subject.prompts[0]
    whole = PackedSession(model).step({"whole": ids})["whole"]
    for size in (3, 7, len(ids) // 2 + 1):
        session = PackedSession(model)
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            require_same_logits(
                session.step({"chunks": piece})["chunks"],
                whole[start : start + len(piece)],
                problem=f"prefill in chunks of {size} differs from one prefill",
                where=f"tokens {start} to {start + len(piece) - 1}",
                tolerance=logits_tolerance(whole),
                look=CACHE,
            )


def ragged_batch(subject: Subject) -> None:
    """Requests of unequal lengths, prefilling and decoding in one batch, get what each gets alone.

    Raises:
        CheckFailure: Naming the request.
    """
    model = model_of(subject)
    names = [str(number) for number in range(len(subject.prompts))]
    prompts = dict(zip(names, subject.prompts, strict=True))
    alone = {name: PackedSession(model).step({name: prompts[name]})[name] for name in names}
    session = PackedSession(model, num_blocks=256)
    halves = {name: prompts[name][: (len(prompts[name]) + 1) // 2] for name in names[::2]}
    steps = [halves]
    done = {name: len(ids) for name, ids in halves.items()}
    steps.append({name: prompts[name][done.get(name, 0) :] for name in names})
    at = dict.fromkeys(names, 0)
    for step in steps:
        batch = {name: ids for name, ids in step.items() if ids}
        for name, got in session.step(batch).items():
            start = at[name]
            at[name] += len(got)
            require_same_logits(
                got,
                alone[name][start : at[name]],
                problem="a request in a ragged batch differs from the same request alone",
                where=f"request {name}, tokens {start} to {at[name] - 1}, in a batch of "
                f"{[len(ids) for ids in batch.values()]} tokens",
                tolerance=logits_tolerance(alone[name]),
                look=BATCH,
            )
