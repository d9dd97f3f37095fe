"""The digest of a load plan: two plans of the same digest fill every parameter alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llmfw.weights.expressions import Concat, Expr, Narrow, Reorder, Source, Stack, Transpose
from llmfw.weights.plan import LoadPlan, dtype_text


def layout_digest(plan: LoadPlan) -> str:
    """SHA-256 of which elements of which tensors go where; stored dtypes, files do not count."""
    described = {
        "parameters": {
            filled.slot.path: {
                "shape": filled.slot.shape,
                "zeroed": filled.slot.zeroed,
                "dtype": None if filled.dtype is None else dtype_text(filled.dtype),
                "fills": [[fill.part.start, describe(fill.expr)] for fill in filled.fills],
            }
            for filled in plan.filled
        },
        "ties": plan.ties,
        "ignored": {ignored.name: describe(ignored.expr) for ignored in plan.ignored},
    }
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def describe(expr: Expr) -> list[Any]:
    """A lazy tensor as nested lists."""
    match expr:
        case Source():
            return ["tensor", expr.name, expr.shape]
        case Narrow():
            return ["narrow", expr.dim, expr.start, expr.stop, describe(expr.of)]
        case Concat():
            return ["concat", expr.dim, *map(describe, expr.parts)]
        case Stack():
            return ["stack", *map(describe, expr.parts)]
        case Transpose():
            return ["transpose", describe(expr.of)]
        case Reorder():
            return ["reorder", expr.dim, expr.view, expr.permutation, describe(expr.of)]
    raise AssertionError(f"no description of {type(expr).__name__}")
