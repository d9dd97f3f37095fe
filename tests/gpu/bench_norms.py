"""Section of the benchmark: layers without attention, norms as kernels or inside the products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpu.bench_common import BF16, DEVICE, MODELS, context_of, kernel, randn, report, rotated
from gpu.bench_products import product_shapes
from llmfw.kernels.cupy import gated_linear, linear, normed_linear, tune
from llmfw.kernels.cupy.compile import compile_ahead
from llmfw.kernels.cupy.gemv import Gemv
from llmfw.kernels.cupy.products import Role
from llmfw.kernels.cupy.streamed import Streamed
from llmfw.ops.kernel import OpContext

ROWS = (1, 2, 4, 8, 16, 32, 64)
ROWS_ALONE = (1, 8, 32, 64)
OWN = (Gemv, Streamed)
LEAST_BYTES = 480 << 20  # of a chain's weights, far beyond the L2
ADDING = ("o", "down")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """The kernels of a model's layer: products alone with the norm, and those that share it."""

    name: str
    plain: dict[str, Callable[..., Any]]
    joined: dict[str, Callable[..., Any]]
    norm: Callable[..., Any]

    @classmethod
    def of(cls, name: str) -> Layer:
        """Those of one of MODELS."""
        plain = {label: kernel(*use[:2]) for label, use in uses(name).items()}
        joined = {label: kernel(use[2], use[1]) for label, use in uses(name).items()}
        return cls(name, plain, joined, kernel("add_rms_norm", {"hidden_size": MODELS[name][0]}))


def uses(name: str) -> dict[str, tuple[str, dict[str, int], str]]:
    """Of each product: its op, its shape and the op that shares a norm."""
    hidden, inner = MODELS[name][:2]
    found: dict[str, tuple[str, dict[str, int], str]] = {}
    for label, (width, outputs) in product_shapes()[name].items():
        if label != "head":
            shape = {"in_features": width, "out_features": outputs, "bias": 0}
            found[label] = ("linear", shape, f"{'add' if label in ADDING else 'normed'}_linear")
    shape = {"in_features": hidden, "intermediate_size": inner, "bias": 0}
    found["gate_up"] = ("gated_linear", shape, "normed_gated_linear")
    return found


def norms() -> None:
    """Layers, then each product alone."""
    chains()
    for name in MODELS:
        for label in uses(name):
            each_alone(name, label)


def chains() -> None:
    """Microseconds a layer both ways."""
    for name in MODELS:
        layer = Layer.of(name)
        weights = chain_weights(name)
        nbytes = sum(weight.numel() * 2 for weight in weights[0].values())
        for rows in ROWS:
            served = [k for k, call in layer.joined.items() if call.serves_rows(rows)]
            times = {
                kind: tune.graph_time([chain(layer, weights, rows)], launches=4, repeats=6)
                / len(weights)
                for kind, chain in (("kernels", with_kernels), ("inside", inside))
            }
            saved = round(times["kernels"] - times["inside"], 2)
            for kind, us in times.items():
                extra = {"saved": saved, "served": len(served)} if kind == "inside" else {}
                report("norms", f"{name} {rows} rows, norms {kind}", us, nbytes, **extra)
        del weights
        torch.cuda.empty_cache()


def chain_weights(name: str) -> list[Weights]:
    """Random weights of as many layers as leave every cache."""
    shapes = {label: size for label, size in product_shapes()[name].items() if label != "head"}
    layer = sum(2 * inner * outer for inner, outer in shapes.values())
    return [
        {
            label: torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
            for label, (inner, outer) in shapes.items()
        }
        for _ in range(max(4, -(-LEAST_BYTES // layer)))
    ]


def with_kernels(layer: Layer, weights: list[Weights], rows: int) -> Callable[[], object]:
    """The layers with add_rms_norm between products."""
    attended, start, scales = inputs(layer.name, rows)
    call, norm = layer.plain, layer.norm
    residual = start.clone()

    def run() -> object:
        x = start
        for one in weights:
            call["qkv"](x, one["qkv"], None)
            x = norm(call["o"](attended, one["o"], None), residual, scales, 1e-6)[0]
            x = call["down"](call["gate_up"](x, one["gate_up"], None), one["down"], None)
            x = norm(x, residual, scales, 1e-6)[0]
        return x

    return run


def inside(layer: Layer, weights: list[Weights], rows: int) -> Callable[[], object]:
    """The same with norms inside the products."""
    attended, residual, scales = inputs(layer.name, rows)
    call = layer.joined
    first = call["down"](
        randn(rows, MODELS[layer.name][1]), weights[0]["down"], residual.clone(), scales
    )

    def run() -> object:
        x, squares = first
        for one in weights:
            call["qkv"](x, residual, squares, one["qkv"])
            x, squares = call["o"](attended, one["o"], residual, scales)
            gated = call["gate_up"](x, residual, squares, one["gate_up"])
            x, squares = call["down"](gated, one["down"], residual, scales)
        return x

    return run


def inputs(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What stands for attention's result, the residual stream, norm weights."""
    hidden, _, heads, _, dim, _, _ = MODELS[name]
    return randn(rows, heads * dim), randn(rows, hidden), randn(hidden)


def each_alone(name: str, label: str) -> None:
    """Every variant of a product in its role; beside it the tuning's choice, there and plain."""
    op, shape, joined = uses(name)[label]
    context = context_of(op, shape)
    contest = (gated_linear if op == "gated_linear" else linear).contest(context)
    role = Role.ADDS if joined == "add_linear" else Role.NORMED
    found = {
        rows: [replace(v, role=role) for v in contest.variants[rows] if isinstance(v, OWN)]
        for rows in ROWS_ALONE
    }
    sources = [(v.source, v.constants(rows, context)) for rows in found for v in found[rows]]
    compile_ahead(DEVICE, BF16, sources)
    chosen = tune.choices(contest, normed_linear.MARGIN)
    known = tune._Table.of(0).entries[contest.key]
    for rows, variants in found.items():
        times = {v.name: alone(context, joined, contest, rows, v) for v in variants}
        if rows in chosen and times:
            mine, best = chosen[rows].name, min(times, key=lambda one: times[one])
            report(
                "norms",
                f"{name} {label} {rows} rows, {role.name.lower()}",
                times[mine],
                contest.weight_rows * shape["in_features"] * 2,
                plain=known[str(rows)][mine],
                chosen=mine,
                best=f"{best} {times[best]:.2f}",
            )


def alone(
    context: OpContext, joined: str, contest: tune.Contest, rows: int, variant: Gemv | Streamed
) -> float:
    """Microseconds of one variant, with weights that no cache holds."""
    width = context["in_features"]
    call = getattr(normed_linear, joined)(context, {rows: variant})
    x, out, scales = randn(rows, width), randn(rows, contest.outputs), randn(contest.outputs)
    squares = torch.ones(rows, 64, device=DEVICE)

    def make() -> Callable[[], object]:
        weight = torch.empty(contest.weight_rows, width, dtype=BF16, device=DEVICE).normal_(0, 0.02)
        if joined == "add_linear":
            return functools.partial(call, x, weight, out, scales)
        return functools.partial(call, x, x, squares, weight)

    return tune.graph_time(rotated(contest.weight_rows * width * 2, make), 64)
