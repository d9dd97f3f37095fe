"""When two results are equal: logits, greedy tokens and their ties (architecture rule 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmfw.testing.failure import CheckFailure

ATOL = 1e-4
"""Largest difference of logits in float32 on tiny models."""
REAL_TIE, TINY_TIE = 2e-3, 1e-4
"""Two logits of the reference that are closer than this are a tie (float32)."""


def logits_tolerance(expected: torch.Tensor, relative: float | None = None) -> float:
    """What may differ: ATOL, and more where logits are larger than a trained model's.

    Args:
        expected: The reference's logits.
        relative: A part of the largest logit instead, for logits of no usual size.
    """
    size = float(expected.abs().max())
    return size * relative if relative is not None else ATOL * max(1.0, size / 10)


def require_same_logits(
    got: torch.Tensor,
    expected: torch.Tensor,
    *,
    problem: str,
    where: str,
    tolerance: float | None = None,
    module: str | None = None,
    look: str | None = None,
) -> None:
    """Fail unless logits [tokens, vocab] are equal.

    Raises:
        CheckFailure: Naming the first position that differs and its worst token.
    """
    if got.shape != expected.shape:
        raise CheckFailure(
            problem,
            module=module,
            tensor=f"logits of {where}",
            expected=f"shape {list(expected.shape)}",
            got=f"shape {list(got.shape)}",
            look=look,
        )
    allowed = logits_tolerance(expected) if tolerance is None else tolerance
    difference = (got.float() - expected.float()).abs()
    difference = torch.where(difference.isnan(), float("inf"), difference)
    worst = float(difference.max())
    if worst <= allowed:
        return
    position = int((difference.amax(-1) > allowed).nonzero()[0])
    token = int(difference[position].argmax())
    wrong = int((difference.amax(-1) > allowed).sum())
    raise CheckFailure(
        f"{problem}: max |difference| {worst:.2e}, allowed {allowed:.1e}, "
        f"at {wrong} of {len(difference)} positions",
        module=module,
        tensor=f"logits of {where}, first at position {position}, token {token}",
        expected=f"{float(expected[position, token]):.6g}",
        got=f"{float(got[position, token]):.6g}",
        look=look,
    )


def first_wrong_token(
    logits: torch.Tensor, tokens: Sequence[int], tie: float
) -> tuple[int, int, float] | None:
    """The first greedy token that is not the reference's, up to the first tie.

    Args:
        logits: The reference's, one row for each token: [tokens, vocab].
        tokens: What was generated.
        tie: Logits closer than this are a tie; the comparison ends at the first.

    Returns:
        Step, the reference's token and how far its logit is above, or None.
    """
    for step, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        gap = float(row.max() - row[token])
        if gap >= tie:
            return step, int(row.argmax()), gap
        if gap > 0:
            return None
    return None


def require_greedy(
    reference: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int], tie: float
) -> None:
    """Fail unless each token is the reference's greedy choice after those before it.

    One whole forward over prompt and tokens: where all agree, its own generation is the same.

    Raises:
        CheckFailure: Naming the first token that is another.
    """
    logits = reference_logits(reference, [*prompt, *tokens])[len(prompt) - 1 : -1]
    wrong = first_wrong_token(logits, tokens, tie)
    if wrong is not None:
        step, token, gap = wrong
        raise CheckFailure(
            "greedy tokens differ from the reference's",
            tensor=f"generated token {step} after a prompt of {len(prompt)}",
            expected=f"{token}, whose logit is {gap:.2e} higher (a tie is below {tie:.0e})",
            got=tokens[step],
        )


def reference_logits(reference: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """The reference's logits of every position of one prompt: float32 [tokens, vocab]."""
    device = next(reference.parameters()).device
    with torch.inference_mode():
        return logits_of(reference(torch.tensor([list(ids)], device=device)))[0].float().cpu()


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a reference returns: a tensor, a tuple or an object with `logits`."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]  # type: ignore[no-any-return]
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits  # type: ignore[no-any-return]


def random_prompts(count: int, vocab: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids; lengths from `low` to `high`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
