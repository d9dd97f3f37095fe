"""The first module whose activations differ: layer by layer, then inside the layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmfw.testing.correspondence import Correspondence, Pair
from llmfw.testing.failure import CheckSkipped
from llmfw.testing.trace import Recording, key_of

if TYPE_CHECKING:
    from llmfw.testing.subject import Subject

TOLERANCE = {"float32": 1e-4, "float16": 4e-2, "bfloat16": 2e-1}
"""Allowed |difference| / |reference| of one token's activations."""

SLIGHT = 20
"""A stream that is this much nearer than the tolerance is right for certain."""

STAGES = {
    "input": "input",
    "output": "output",
    "q": "q after rope, times its scale",
    "k": "k after rope",
    "v": "v",
    "context": "attention output before the output projection",
}
BETWEEN = "residual, scales, activation, gate and up exchanged, embedding scale, positions"
ADVICE = {
    "input": "what happens before",
    "q": "rope base, rotated part, pair layout, q norm, attention scale, q/k/v order",
    "k": "rope base, rotated part, pair layout, k norm, positions, which slots are written",
    "v": "order of q, k and v in the fused projection; which slots are written",
    "context": "sliding window, soft cap, mask, grouping of heads, what the cache holds",
    "output": "its weights, its bias, its constants (eps, offset, activation, scale)",
}


@dataclass(frozen=True)
class Divergence:
    """Where ours first differs.

    Args:
        pair: The stage that differs; all before it agree.
        after: Our module just before it, where it is the input that differs: the fault is between.
        layer: Index of the decoder layer, None outside.
        error, allowed: |difference| / |reference| of the worst token.
        token: Which token that is.
        expected, got: A few of its features, from the worst on.
    """

    pair: Pair
    after: str | None
    layer: int | None
    error: float
    allowed: float
    token: int
    expected: tuple[float, ...]
    got: tuple[float, ...]

    @property
    def module(self) -> str:
        """Our module to look into: the differing one, or the one whose code feeds it."""
        if self.pair.stage != "input":
            return self.pair.ours
        if self.after is None:
            return self.pair.ours.rpartition(".")[0] or self.pair.ours
        return common_parent(self.after, self.pair.ours)

    @property
    def where(self) -> str:
        """Both paths, and the stage."""
        if not self.pair.ours:
            return "the model itself, after the last module: the logits"
        text = f"{self.pair.name} (reference: {self.pair.theirs}), {STAGES[self.pair.stage]}"
        if self.pair.stage == "input":
            between = f"after {self.after}" if self.after else "at its beginning"
            text = f"{self.module}, {between}: {text}"
        return text

    def explain(self) -> str:
        """What to look at."""
        what = ADVICE[self.pair.stage] if self.pair.ours else "logit scale, soft cap of logits"
        if self.pair.stage == "input":
            what = f"forward() of {self.module}: what happens before {self.pair.ours} ({BETWEEN})"
        return (
            f"{what}\nthe first activation that differs: error {self.error:.1e}, allowed "
            f"{self.allowed:.0e}, worst at token {self.token}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "module": self.module,
            "ours": self.pair.ours,
            "part": self.pair.part or None,
            "reference": self.pair.theirs,
            "stage": self.pair.stage,
            "after": self.after,
            "layer": self.layer,
            "error": self.error,
            "allowed": self.allowed,
            "token": self.token,
            "expected": list(self.expected),
            "got": list(self.got),
            "look_at": self.explain(),
        }


def common_parent(first: str, second: str) -> str:
    """The innermost module that both paths are in (or are)."""
    parts: list[str] = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def first_divergence(
    ours: Recording,
    theirs: Recording,
    correspondence: Correspondence,
    *,
    rows: slice = slice(None),
    tolerance: float,
) -> Divergence | None:
    """The first difference, or None.

    Streams between layers are compared first. Inside the first layer that spoils the stream, the
    order of our own execution decides; differences in layers that leave the stream right are
    another way to compute the same.

    Args:
        ours, theirs: Recordings of the same tokens.
        correspondence: What is compared with what.
        rows: The tokens of theirs that ours has.
        tolerance: Allowed |difference| / |reference| of a token. Where nothing exceeds it although
            the logits differ, smaller ones are tried.
    """
    events = list(_events(ours, theirs, correspondence, rows))
    for limit in (tolerance, tolerance / 10, tolerance / 50):
        found = _first(events, correspondence.layers, limit)
        if found is not None:
            return found
    return None


def _first(events: Sequence[_Event], layers: Sequence[str], tolerance: float) -> Divergence | None:
    bad = next((i for i, layer in enumerate(layers) if _spoils(events, layer, tolerance)), None)
    start = _last_agreement(events, layers, bad, tolerance)
    for number, event in enumerate(events):
        if number > start and event.error > tolerance and _in_scope(event.pair, layers, bad):
            return _divergence(events, number, event, layers, tolerance)
    return None


def _last_agreement(
    events: Sequence[_Event], layers: Sequence[str], bad: int | None, tolerance: float
) -> int:
    """The last event before the fault where the whole stream is right; -1 for none.

    What differs before it is another way to compute the same (an embedding scaled inside or
    outside of its module).
    """
    wanted = ("", "")
    if layers:
        wanted = (layers[-1], "output") if bad is None else (layers[bad], "input")
    for number, event in enumerate(events):
        if (event.pair.ours, event.pair.stage) == wanted and event.error <= tolerance:
            return number
    return -1


@dataclass(frozen=True)
class _Event:
    pair: Pair
    got: torch.Tensor
    expected: torch.Tensor
    error: float
    token: int


def _events(
    ours: Recording, theirs: Recording, correspondence: Correspondence, rows: slice
) -> Iterator[_Event]:
    for key, value in ours.items():
        path, _, stage = key.rpartition("|")
        for pair in correspondence.pairs.get((path, stage), ()):
            found = theirs.get(key_of(pair.theirs, stage))
            if found is None:
                continue
            expected = found[rows]
            if pair.theirs_columns is not None and stage == "output":
                expected = expected[:, list(pair.theirs_columns)]
            got = value if pair.columns is None or stage != "output" else value[:, pair.columns]
            if got.shape == expected.shape:
                error = _errors(got, expected)
                yield _Event(pair, got, expected, float(error.max()), int(error.argmax()))


def _errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|difference| / |reference| of each token; infinite where there is a NaN."""
    difference = (got.double() - expected.double()).norm(dim=-1)
    size = expected.double().norm(dim=-1)
    error = torch.where(size > 0, difference / size.clamp_min(1e-30), difference)
    return torch.where(error.isnan(), float("inf"), error)


def _spoils(events: Sequence[_Event], layer: str, tolerance: float) -> bool:
    """Whether a layer's stream comes out wrong; a little is enough where its inside is wrong."""
    inside = max((e.error for e in events if e.pair.ours.startswith(f"{layer}.")), default=0.0)
    limit = tolerance / SLIGHT if inside > tolerance else tolerance
    return any(
        event.pair.ours == layer and event.pair.stage == "output" and event.error > limit
        for event in events
    )


def _in_scope(pair: Pair, layers: Sequence[str], bad: int | None) -> bool:
    """Outside of all layers, or in the one that spoils the stream, or its own ends."""
    own = next((i for i, x in enumerate(layers) if f"{pair.ours}.".startswith(f"{x}.")), None)
    return own is None or own == bad


def _divergence(
    events: Sequence[_Event], number: int, event: _Event, layers: Sequence[str], tolerance: float
) -> Divergence:
    before = None
    if event.pair.stage == "input":
        done = [e.pair.ours for e in events[:number] if e.pair.stage != "input"]
        before = done[-1] if done else None
    own = [i for i, layer in enumerate(layers) if f"{event.pair.ours}.".startswith(f"{layer}.")]
    token = event.token
    feature = int((event.got[token] - event.expected[token]).abs().nan_to_num(1e30).argmax())
    shown = slice(feature, feature + 3)
    return Divergence(
        event.pair,
        before,
        own[0] if own else None,
        event.error,
        tolerance,
        token,
        tuple(round(x, 6) for x in event.expected[token, shown].tolist()),
        tuple(round(x, 6) for x in event.got[token, shown].tolist()),
    )


def diagnose(
    subject: Subject, weights: str, steps: Sequence[dict[str, list[int]]], name: str
) -> Divergence | None:
    """The first divergence of a tiny model from its reference.

    Args:
        subject: What is checked.
        weights: Which of its weights.
        steps: The batches to feed; the last one is compared.
        name: The request in them that is compared.
    """
    from llmfw.testing.checks.weights import tiny_parts
    from llmfw.testing.correspondence import correspond
    from llmfw.testing.trace import record_ours, record_reference

    try:
        parts = tiny_parts(subject)
    except CheckSkipped:
        return None
    reference = subject.reference_model(weights)
    correspondence = correspond(parts.model, reference, parts.checkpoint, parts.weight_map)
    ids = [token for step in steps for token in step.get(name, [])]
    ours, _ = record_ours(subject.model(weights), steps, name)
    theirs, _ = record_reference(reference, ids)
    count = len(steps[-1][name])
    return first_divergence(
        ours,
        theirs,
        correspondence,
        rows=slice(len(ids) - count, len(ids)),
        tolerance=TOLERANCE["float32"],
    )
