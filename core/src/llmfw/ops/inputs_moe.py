"""Inputs for checking the kernels of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from llmfw.ops.drawn import Arguments, Case, OpInputs, normal, shapes
from llmfw.ops.kernel import OpContext


def _grouped_linear(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    groups, width, outs = context["num_groups"], context["in_features"], context["out_features"]
    weight = normal(context, generator, groups, outs, width)
    for rows in (0, 1, 2, 7, 33):
        chosen = torch.randint(0, groups, (rows,), generator=generator)
        ends = torch.bincount(chosen, minlength=groups).cumsum(0).to(torch.int32)
        x = normal(context, generator, rows, width)
        yield Case(f"rows={rows}", (x, weight, ends.to(context.info.device)))


def _moe_route(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    experts, top_k = context["num_experts"], context["top_k"]
    for tokens in (0, 1, 5, 33):
        # distinct in every dtype: which of two equal logits is chosen is not fixed
        ranks = torch.rand(tokens, experts, generator=generator).argsort(-1)
        logits = (ranks / 8).to(context.info.device, context.dtype)
        for scoring, renormalize in (
            ("softmax", False),
            ("softmax", True),
            ("sigmoid", True),
            ("topk_softmax", False),
        ):
            arguments: Arguments = (logits, top_k, scoring, renormalize)
            if context.shape.get("num_groups", 1) > 1:
                bias = (torch.rand(experts, generator=generator) / 64).to(context.info.device)
                arguments = (*arguments, bias, context["num_groups"], 2, 2, 2.5)
            yield Case(f"tokens={tokens} {scoring} renormalize={renormalize}", arguments)


def _moe_experts(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    count, bias = context["num_experts"], context["bias"]
    hidden, inner = context["hidden_size"], context["intermediate_size"]
    scale = hidden**-0.5
    gate_up = normal(context, generator, count, 2 * inner, hidden) * scale
    down = normal(context, generator, count, hidden, inner) * scale
    biases = (
        normal(context, generator, count, 2 * inner) if bias else None,
        normal(context, generator, count, hidden) if bias else None,
    )
    top_k, device = min(count, 4), context.info.device
    for tokens in (0, 1, 3, 17, 130):
        x = normal(context, generator, tokens, hidden)
        experts = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :top_k]
        experts[tokens // 2 :] %= max(count // 2, top_k)  # some have many rows, others none
        weights = torch.rand(tokens, top_k, generator=generator).to(device)
        act = MOE_CODES[context.code]
        arguments = (x, weights, experts.to(device), gate_up, down, *biases, act)
        yield Case(f"tokens={tokens}", arguments)
        added = normal(context, generator, tokens, hidden)
        yield Case(f"tokens={tokens} added", (*arguments, added))


def _on_halves(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> object:
    return lambda x: function(*x.chunk(2, -1))


MOE_CODES: Mapping[str, object] = {
    "": _on_halves(lambda gate, up: torch.sigmoid(gate) + up),
    "silu(gate) * up": _on_halves(lambda gate, up: F.silu(gate) * up),
    "fminf(gate, 1.0f) * (up + 1.0f)": _on_halves(lambda gate, up: gate.clamp(max=1) * (up + 1)),
}


MOE_INPUTS: dict[str, OpInputs] = {
    "grouped_linear": OpInputs(
        shapes(
            "num_groups in_features out_features",
            (1, 1, 1),
            (5, 33, 7),
            (16, 64, 96),
            (128, 256, 512),
        ),
        _grouped_linear,
    ),
    "moe_route": OpInputs(
        shapes("num_experts top_k num_groups", (1, 1, 1), (8, 2, 1), (60, 4, 1), (48, 6, 4)),
        _moe_route,
    ),
    "moe_experts": OpInputs(
        shapes(
            "num_experts hidden_size intermediate_size bias",
            (1, 8, 5, 0),
            (9, 33, 7, 1),
            (16, 128, 64, 0),
            (40, 64, 192, 1),
        ),
        _moe_experts,
        tuple(MOE_CODES),
    ),
}
