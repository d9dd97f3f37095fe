"""Inputs for the kernels of a mixture of experts: routing, and the experts themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.ops.reference_moe import _best_groups

ROUTERS = [(64, 64, False), (520, 5, False), (2048, 64, True), (2880, 33, True), (7168, 256, True)]
LEAST_GAP = 1e-5  # between scores to choose by, in shares of the greatest: 80 roundings of float32


def router_cases() -> Iterator[Case]:
    """float32_linear: inputs, outputs and rows for each of its tiles, and for the library."""
    for dtype in ("bfloat16", "float16"):
        for width, outputs, wide in ROUTERS:
            for rows in (1, 2, 4, 5, 33, 64, *((130, 700) if wide else ())):
                for bias in (0, 1):

                    def draw(
                        d: torch.device,
                        t: torch.dtype,
                        g: torch.Generator,
                        w=width,
                        n=outputs,
                        r=rows,
                        b=bias,
                    ) -> Arguments:
                        x = randn(r, w, device=d, dtype=t, generator=g)
                        wide = {"device": d, "dtype": torch.float32, "generator": g}
                        weight = randn(n, w, scale=w**-0.5, **wide)
                        return (x, weight, randn(n, **wide) if b else None), {}

                    label = f"{rows}x{width}x{outputs}" + "b" * bias
                    shape = {"in_features": width, "out_features": outputs, "bias": bias}
                    yield Case(
                        "float32_linear", dtype, shape, draw, label, wide=wide, facts={"rows": rows}
                    )


def route_cases() -> Iterator[Case]:
    """moe_route: every scoring, with and without a bias and groups."""
    shapes = [(1, 1, 1), (8, 2, 1), (60, 4, 1), (48, 6, 4), (128, 8, 1), (256, 8, 8)]
    for dtype in DTYPE_NAMES:
        for count, top_k, groups in shapes:
            for scoring in ("softmax", "topk_softmax", "sigmoid"):
                for tokens, wide in [(1, False), (5, False), (700, True)]:

                    def draw(
                        d: torch.device,
                        t: torch.dtype,
                        g: torch.Generator,
                        n=tokens,
                        e=count,
                        k=top_k,
                        s=scoring,
                        grouped=groups,
                    ) -> Arguments:
                        groups = None
                        if grouped > 1:
                            groups = torch.rand(e, generator=g) / 512, grouped, 2, 2
                        logits = clear_logits(n, e, k, s, groups, g)
                        routing = (groups[0].to(d), *groups[1:], 2.5) if groups else ()
                        return (logits.to(d, t), k, s, s != "softmax", *routing), {}

                    shape = {"num_experts": count, "top_k": top_k, "num_groups": groups}
                    label = f"{tokens}x{count}-{scoring}"
                    yield Case("moe_route", dtype, shape, draw, label, wide=wide, tolerance=1e-5)


Groups = tuple[torch.Tensor, int, int, int]  # moe_route's bias, num_groups, top_groups, group_best


def clear_logits(
    tokens: int, count: int, top_k: int, scoring: str, groups: Groups | None, g: torch.Generator
) -> torch.Tensor:
    """Logits [tokens, count] for which float32 allows one choice and one order of experts.

    Where two scores are as near as their roundings a sigmoid that ends in another last bit, or
    another order of equals, is as right. All values are distinct, and the same in all dtypes.
    """
    kept = torch.empty(0, count)
    while len(kept) < tokens:
        drawn = torch.rand(tokens, count, generator=g).argsort(-1) / 32
        kept = torch.cat((kept, drawn[is_clear(drawn, top_k, scoring, groups)]))
    return kept[:tokens]


def is_clear(logits: torch.Tensor, top_k: int, scoring: str, groups: Groups | None) -> torch.Tensor:
    """Whether each row's choices, in float64, are further apart than LEAST_GAP: bool [rows]."""
    scores = logits.double()
    if scoring != "topk_softmax":
        scores = scores.softmax(-1) if scoring == "softmax" else scores.sigmoid()
    clear = torch.ones(len(logits), dtype=torch.bool)
    if groups is not None:
        bias, num_groups, top_groups, group_best = groups
        scores = scores + bias
        sums = scores.unflatten(-1, (num_groups, -1)).topk(group_best).values.sum(-1)
        clear = gaps(sums, top_groups)[:, -1] > LEAST_GAP  # groups have no order
        scores = _best_groups(scores, num_groups, top_groups, group_best)
    return clear & (gaps(scores, top_k) > LEAST_GAP).all(-1)


def gaps(values: torch.Tensor, count: int) -> torch.Tensor:
    """How far each of the `count` greatest is above the next one, in shares of the greatest."""
    best = values.topk(min(count + 1, values.shape[-1])).values
    return -best.diff(dim=-1) / best[:, :1]


EXPERT_CODES = {
    "": lambda gate, up: torch.sigmoid(gate) + up,
    "silu(gate) * up": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "fminf(gate, 1.0f) * (up + 1.0f)": lambda gate, up: gate.clamp(max=1) * (up + 1),
}
EXPERT_SIZES = [  # experts, top_k, hidden, intermediate, bias, wide
    (5, 2, 64, 64, 0, False),
    (16, 4, 128, 192, 1, False),
    (128, 8, 256, 192, 0, True),
    (8, 2, 1024, 768, 1, True),
]


def expert_cases() -> Iterator[Case]:
    """moe_experts: numbers of tokens that each of its ways serves, activations, biases."""
    for dtype in ("bfloat16", "float16"):
        for count, top_k, hidden, inner, bias, wide in EXPERT_SIZES:
            shape = {
                "num_experts": count,
                "hidden_size": hidden,
                "intermediate_size": inner,
                "bias": bias,
            }
            for code in EXPERT_CODES:
                for tokens in (1, 4, 5, 40, *((1030,) if wide else ())):

                    def draw(
                        d: torch.device,
                        t: torch.dtype,
                        g: torch.Generator,
                        s=shape,
                        n=tokens,
                        k=top_k,
                        c=code,
                    ) -> Arguments:
                        return expert_arguments(d, t, g, s, n, k, c), {}

                    label = f"{tokens}t-{count}x{hidden}x{inner}" + "f" * bool(code)
                    facts = {"rows": tokens}
                    yield Case(
                        "moe_experts", dtype, shape, draw, label, wide=wide, facts=facts, code=code
                    )


def expert_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    tokens: int,
    top_k: int,
    code: str,
) -> tuple[Any, ...]:
    """Arguments of moe_experts in which some experts have many rows and others none."""
    count, hidden, inner = (
        shape[name] for name in ("num_experts", "hidden_size", "intermediate_size")
    )

    def values(*size: int, scale: float = 1.0) -> torch.Tensor:
        return randn(*size, device=device, dtype=dtype, generator=g, scale=scale)

    scores = torch.rand(tokens, count, generator=g)
    scores[:, : count // 2] += 0.5
    return (
        values(tokens, hidden),
        torch.rand(tokens, top_k, generator=g).to(device),
        scores.topk(top_k).indices.to(device),
        values(count, 2 * inner, hidden, scale=hidden**-0.5),
        values(count, hidden, inner, scale=inner**-0.5),
        values(count, 2 * inner) if shape["bias"] else None,
        values(count, hidden) if shape["bias"] else None,
        lambda x: EXPERT_CODES[code](*x.chunk(2, -1)),
        values(tokens, hidden) if shape["bias"] else None,
    )
