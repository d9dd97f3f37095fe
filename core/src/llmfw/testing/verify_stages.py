"""The comparisons of `llmfw verify`, in the order in which one explains the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmfw.sampling_params import SamplingParams
from llmfw.testing.checks.logits import ragged_steps
from llmfw.testing.compare import (
    REAL_TIE,
    TINY_TIE,
    first_wrong_token,
    logits_tolerance,
    reference_logits,
)
from llmfw.testing.packed import PackedSession
from llmfw.testing.verify_report import Stage
from llmfw.testing.verify_sides import Sides, Steps

RELATIVE = {"float16": 0.025, "bfloat16": 0.12}
"""Of the largest logit of the prompt, in dtypes that round: twice what 30 sound layers gave."""


@dataclass(frozen=True)
class Limits:
    """What may differ.

    Args:
        dtype: Name of the dtype that both run in.
        tiny: Whether the weights are tiny and random.
        relative: A part of the largest logit, in place of the dtype's rule.
    """

    dtype: str
    tiny: bool
    relative: float | None = None

    def logits(self, expected: torch.Tensor) -> float:
        """Allowed |difference| of logits."""
        relative = self.relative or RELATIVE.get(self.dtype)
        if relative is not None or self.tiny:
            return logits_tolerance(expected, relative)
        return REAL_TIE * max(1.0, float(expected.abs().max()) / 20)

    def tie(self, expected: torch.Tensor) -> float:
        """Logits of the reference that are closer than this are a tie."""
        if self.dtype in RELATIVE or self.relative is not None:
            return self.logits(expected)
        return TINY_TIE if self.tiny else REAL_TIE


@dataclass
class Ours:
    """What ours gave for each prompt, on the CPU.

    prefill: logits of each prompt alone, [tokens, vocab].
    tokens: what the engine generated greedily, all prompts in one batch.
    decode: logits of those tokens fed one at a time, [generated, vocab].
    batch: the largest |difference| of a ragged batch's logits to prefill's, by prompt, and the
        batches up to there.
    """

    prompts: list[list[int]]
    prefill: list[torch.Tensor]
    tokens: list[list[int]]
    decode: list[torch.Tensor]
    batch: list[tuple[float, Steps]]


@dataclass(frozen=True)
class Failing:
    """Steps that show a difference, to be recorded."""

    steps: Steps
    name: str


def run_ours(sides: Sides, prompts: list[list[int]], max_tokens: int) -> Ours:
    """Run all prompts through ours: alone, step by step, in a ragged batch, and by the engine."""
    llm = sides.ours()
    model = llm.loaded.model
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([list(ids) for ids in prompts], sampling)
    for output in outputs:
        if output.error is not None:
            raise output.error
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    blocks = sum(len(ids) + max_tokens for ids in prompts) // model.model_config.block_size
    blocks += 2 * len(prompts) + 2
    prefill, decode = [], []
    for ids, generated in zip(prompts, tokens, strict=True):
        session = PackedSession(model, num_blocks=blocks)
        prefill.append(session.step({"a": ids})["a"].float().cpu())
        steps = [session.step({"a": [token]})["a"].float().cpu() for token in generated[:-1]]
        decode.append(torch.cat([prefill[-1][-1:], *steps]))
    return Ours(prompts, prefill, tokens, decode, _in_a_batch(model, prompts, prefill, blocks))


def _in_a_batch(
    model: object, prompts: list[list[int]], prefill: list[torch.Tensor], blocks: int
) -> list[tuple[float, Steps]]:
    session = PackedSession(model, num_blocks=blocks)  # type: ignore[arg-type]
    steps = ragged_steps({str(number): ids for number, ids in enumerate(prompts)})
    at = [0] * len(prompts)
    worst: list[tuple[float, Steps]] = [(0.0, ())] * len(prompts)
    for number, batch in enumerate(steps):
        for name, logits in session.step(batch).items():
            prompt = int(name)
            start, at[prompt] = at[prompt], at[prompt] + len(logits)
            error = worst_of(logits.float().cpu(), prefill[prompt][start : at[prompt]])
            if error > worst[prompt][0]:
                worst[prompt] = (error, steps[: number + 1])
    return worst


def worst_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |difference|; infinite for a NaN or another shape."""
    if got.shape != expected.shape:
        return float("inf")
    worst = float((got - expected).abs().max())
    return worst if worst == worst else float("inf")


def compare_logits(sides: Sides, ours: Ours, limits: Limits) -> tuple[list[Stage], Failing | None]:
    """All comparisons with the reference; and the first steps that show a difference."""
    expected = [
        reference_logits(sides.reference(), [*ids, *generated])
        for ids, generated in zip(ours.prompts, ours.tokens, strict=True)
    ]
    stages: list[Stage] = []
    failing: list[Failing] = []

    def add(stage: Stage, shows: Failing | None) -> None:
        stages.append(stage)
        if shows is not None:
            failing.append(shows)

    prefill = [rows[: len(ids)] for rows, ids in zip(expected, ours.prompts, strict=True)]
    add(*_prefill(ours, prefill, limits))
    decode = [rows[len(ids) - 1 : -1] for rows, ids in zip(expected, ours.prompts, strict=True)]
    add(*_decode(ours, decode, limits))
    add(*_batch(ours, limits))
    add(*_greedy(ours, decode, limits))
    return stages, failing[0] if failing else None


def _prefill(
    ours: Ours, expected: Sequence[torch.Tensor], limits: Limits
) -> tuple[Stage, Failing | None]:
    errors = [worst_of(*pair) for pair in zip(ours.prefill, expected, strict=True)]
    allowed = [limits.logits(rows) for rows in expected]
    bad = _worst_prompt(errors, allowed)
    stage = _stage("prefill logits", errors, allowed, bad, f"{len(errors)} prompts")
    return stage, None if bad is None else Failing([{"a": ours.prompts[bad]}], "a")


def _decode(
    ours: Ours, expected: Sequence[torch.Tensor], limits: Limits
) -> tuple[Stage, Failing | None]:
    errors = [worst_of(*pair) for pair in zip(ours.decode, expected, strict=True)]
    allowed = [limits.logits(rows) for rows in expected]
    bad = _worst_prompt(errors, allowed)
    steps = len(ours.decode[0])
    stage = _stage("cached decode logits", errors, allowed, bad, f"{steps} steps a prompt")
    if bad is None:
        return stage, None
    rows = (ours.decode[bad] - expected[bad]).abs().amax(-1)
    step = int((~(rows <= allowed[bad])).nonzero()[0])
    fed = [ours.prompts[bad], *([token] for token in ours.tokens[bad][:step])]
    return stage, Failing([{"a": piece} for piece in fed], "a")


def _batch(ours: Ours, limits: Limits) -> tuple[Stage, Failing | None]:
    errors = [error for error, _ in ours.batch]
    allowed = [limits.logits(rows) for rows in ours.prefill]
    bad = _worst_prompt(errors, allowed)
    stage = _stage("batch against single", errors, allowed, bad, f"{len(errors)} requests")
    return stage, None if bad is None else Failing(ours.batch[bad][1], str(bad))


def _greedy(
    ours: Ours, expected: Sequence[torch.Tensor], limits: Limits
) -> tuple[Stage, Failing | None]:
    same = 0
    for number, (tokens, rows) in enumerate(zip(ours.tokens, expected, strict=True)):
        tie = limits.tie(rows)
        wrong = first_wrong_token(rows, tokens, tie)
        if wrong is not None:
            step, token, gap = wrong
            detail = (
                f"prompt {number}, token {step}: got {tokens[step]}, expected {token}, "
                f"whose logit is {gap:.2e} higher"
            )
            stage = Stage("greedy tokens", "failed", detail, gap, tie)
            fed = [ours.prompts[number], *([each] for each in tokens[:step])]
            return stage, Failing([{"a": piece} for piece in fed], "a")
        same += sum(int(row.argmax()) == token for row, token in zip(rows, tokens, strict=True))
    total = sum(map(len, ours.tokens))
    rest = ", the rest after ties" if same < total else ""
    return Stage("greedy tokens", "passed", f"{same} of {total} equal{rest}"), None


def _worst_prompt(errors: Sequence[float], allowed: Sequence[float]) -> int | None:
    """The first prompt that differs too much."""
    pairs = enumerate(zip(errors, allowed, strict=True))
    return next((number for number, (error, limit) in pairs if not error <= limit), None)


def _stage(
    name: str,
    errors: Sequence[float],
    allowed: Sequence[float],
    bad: int | None,
    detail: str,
) -> Stage:
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i]) if bad is None else bad
    told = detail if bad is None else f"first at prompt {bad}"
    outcome = "passed" if bad is None else "failed"
    return Stage(name, outcome, told, errors[worst], allowed[worst])
