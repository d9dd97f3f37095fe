"""Sections of the benchmark: products of few rows, their chain, and whole decoder layers."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from gpu.bench_common import (
    ATTENTION,
    BF16,
    DEVICE,
    MODELS,
    Run,
    attention_shape,
    context_of,
    kernel,
    randn,
    report,
    rope_shape,
)
from gpu.kernel_cases import Batch, attention_arguments
from llmfw.kernels.cupy import gated_linear, linear, tune
from llmfw.ops.kernel import OpContext


def products() -> None:
    """Every variant of every product of both models, cuBLAS beside; fills the tuning cache."""
    for name, shapes in product_shapes().items():
        for label, (inner, outer) in shapes.items():
            contest = linear.contest(linear_context(inner, outer))
            report_contest(f"{name} {label}", contest, inner * outer * 2)
        hidden, inner = MODELS[name][:2]
        shape = {"in_features": hidden, "intermediate_size": inner, "bias": 0}
        contest = gated_linear.contest(context_of("gated_linear", shape))
        report_contest(f"{name} gated", contest, 4 * inner * hidden)


def report_contest(label: str, contest: tune.Contest, nbytes: int) -> None:
    """One line for each bucket of rows."""
    start = time.perf_counter()
    tune.choices(contest)
    took = time.perf_counter() - start
    for bucket, found in tune._Table.of(0).entries[contest.key].items():
        best = min(found, key=lambda n: found[n])
        own = {n: t for n, t in found.items() if n != tune.OTHERWISE}
        report(
            "products",
            f"{label} M={bucket}",
            found[best],
            nbytes,
            best=best,
            otherwise=found[tune.OTHERWISE],
            ranked=dict(sorted(own.items(), key=lambda item: item[1])[:3]),
            tuning_s=round(took, 1),
        )


def product_shapes() -> dict[str, dict[str, tuple[int, int]]]:
    """(inputs, outputs) of each product, by model."""
    return {
        name: {
            "qkv": (hidden, (heads + 2 * kv) * dim),
            "o": (heads * dim, hidden),
            "gate_up": (hidden, 2 * inner),
            "down": (inner, hidden),
            "head": (hidden, vocabulary),
        }
        for name, (hidden, inner, heads, kv, dim, vocabulary, _) in MODELS.items()
    }


def linear_context(inner: int, outer: int) -> OpContext:
    """The context of one product."""
    return context_of("linear", {"in_features": inner, "out_features": outer, "bias": 0})


def chain() -> None:
    """All products of one decode step as a dependent chain in one graph, own and torch's."""
    for name, shapes in product_shapes().items():
        layers = MODELS[name][-1]
        weights = [
            {
                label: torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
                for label, (inner, outer) in shapes.items()
                if label != "head"
            }
            for _ in range(layers)
        ]
        inner, outer = shapes["head"]
        head = torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
        nbytes = sum(w.numel() * 2 for layer in weights for w in layer.values()) + head.numel() * 2
        own, library = chain_products(name)
        for rows in (1, 4, 8, 32, 64, 128, 256):
            # One stream makes a chain of the graph's kernels, so each may have an input of its own.
            inputs = {label: randn(rows, size[0]) for label, size in shapes.items()}
            for kind, call in (("own", own), ("cublas", library)):
                order = [(label, weight) for layer in weights for label, weight in layer.items()]
                order.append(("head", head))
                step = functools.partial(products_of, call, inputs, order)
                us = tune.graph_time([step], launches=2, repeats=5)
                report("chain", f"{name} {kind} M={rows}", us, nbytes)
        del weights, head
        torch.cuda.empty_cache()


def chain_products(name: str) -> tuple[dict[str, Callable[..., torch.Tensor]], ...]:
    """What serves each product of a model, and the library with the activation after it."""
    hidden, inner = MODELS[name][:2]
    shape = {"in_features": hidden, "intermediate_size": inner, "bias": 0}
    activation = kernel("silu_and_mul", {"intermediate_size": inner})

    def apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return activation(F.linear(x, weight, bias))  # type: ignore[no-any-return]

    shapes = product_shapes()[name]
    own = {label: linear.linear(linear_context(*size)) for label, size in shapes.items()}
    own["gate_up"] = kernel("gated_linear", shape)
    return own, {**dict.fromkeys(shapes, F.linear), "gate_up": apart}


def products_of(
    call: dict[str, Callable[..., torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    order: list[tuple[str, torch.Tensor]],
) -> None:
    """All products of a step, one after another."""
    for label, weight in order:
        call[label](inputs[label], weight, None)


def layers() -> None:
    """All decoder layers of one decode step in one graph, by how launches overlap (LLMFW_PDL)."""
    before = os.environ.get("LLMFW_PDL")
    for name in MODELS:
        weights = layer_weights(name)
        for rows, length in ((1, 192), (32, 1024)):
            for mode in ("0", "1", "2"):
                os.environ["LLMFW_PDL"] = mode
                step = decoder_layers(name, weights, rows, length)
                us = tune.graph_time([step], launches=2, repeats=5)
                nbytes = sum(w.numel() * 2 for layer in weights for w in layer.values())
                nbytes += MODELS[name][-1] * rows * length * MODELS[name][3] * MODELS[name][4] * 4
                report("layers", f"{name} {rows} x {length} PDL={mode}", us, nbytes)
        del weights
        torch.cuda.empty_cache()
    if before is None:
        os.environ.pop("LLMFW_PDL", None)
    else:
        os.environ["LLMFW_PDL"] = before


def layer_weights(name: str) -> list[dict[str, torch.Tensor]]:
    """Random weights of all layers' products."""
    shapes = {label: s for label, s in product_shapes()[name].items() if label != "head"}
    return [
        {
            label: torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
            for label, (inner, outer) in shapes.items()
        }
        for _ in range(MODELS[name][-1])
    ]


def decoder_layers(
    name: str, weights: list[dict[str, torch.Tensor]], rows: int, length: int
) -> Run:
    """One decode step's layers with the kernels that the model would use."""
    hidden, inner, heads, kv_heads, dim, _, _ = MODELS[name]
    products = {
        label: kernel("linear", linear_context(*size).shape)
        for label, size in product_shapes()[name].items()
        if label in ("qkv", "o", "down")
    }
    gated = kernel("gated_linear", {"in_features": hidden, "intermediate_size": inner, "bias": 0})
    norm = kernel("add_rms_norm", {"hidden_size": hidden})
    rope = kernel("rope_and_cache", rope_shape(name))
    attend = kernel("paged_attention", attention_shape(name), ATTENTION)
    scales, head_scales = randn(hidden), randn(dim) if name == "S" else None
    cos_sin = torch.rand(length + 1, dim, device=DEVICE)
    batch = Batch(tuple((1, length) for _ in range(rows)))
    args, _ = attention_arguments(
        DEVICE, BF16, torch.Generator().manual_seed(0), attention_shape(name), batch
    )
    _, k, v, metadata, view, scale = args
    metadata = replace(metadata, max_kv_len=1024)
    caches = [(k.clone(), v.clone()) for _ in range(min(8, len(weights)))]
    positions = torch.full((rows,), length - 1, device=DEVICE)
    slots = view.block_tables[:, (length - 1) // 16].long() * 16 + (length - 1) % 16
    start = randn(rows, hidden)

    def run() -> object:
        x, residual = start.clone(), start.clone()
        for number, layer in enumerate(weights):
            k, v = caches[number % len(caches)]
            x, residual = norm(x, residual, scales, 1e-6)
            qkv = products["qkv"](x, layer["qkv"], None)
            q = rope(
                qkv,
                positions,
                cos_sin,
                k,
                v,
                slots,
                heads,
                kv_heads,
                dim,
                False,
                head_scales,
                head_scales,
            )
            x = products["o"](attend(q, k, v, metadata, view, scale), layer["o"], None)
            x, residual = norm(x, residual, scales, 1e-6)
            x = products["down"](gated(x, layer["gate_up"], None), layer["down"], None)
        return x

    return run
