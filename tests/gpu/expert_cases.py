"""Inputs for the kernels of a mixture of experts: routing, and the experts themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.ops.kernel import DTYPE_NAMES


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
                        ranks = torch.rand(n, e, generator=g).argsort(-1)  # distinct in all dtypes
                        bias = torch.rand(e, generator=g).to(d) / 512 if grouped > 1 else None
                        routing = (bias, grouped, 2, 2, 2.5) if grouped > 1 else ()
                        return ((ranks / 32).to(d, t), k, s, s != "softmax", *routing), {}

                    shape = {"num_experts": count, "top_k": top_k, "num_groups": groups}
                    label = f"{tokens}x{count}-{scoring}"
                    yield Case("moe_route", dtype, shape, draw, label, wide=wide, tolerance=1e-5)


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
    )
