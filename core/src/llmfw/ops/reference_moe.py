"""The torch references of a mixture of experts: routing, and one product for each group of rows."""

from __future__ import annotations

import torch


def moe_route(
    logits: torch.Tensor, top_k: int, scoring: str = "softmax", renormalize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts a token by logits [T, E]: weights float32, experts int64 [T, k].

    scoring: "softmax" weighs by the softmax over all experts, and with `renormalize` makes the
    chosen weights sum to one; "topk_softmax" weighs by the softmax over the chosen logits. In
    float32; the order of a token's experts is by weight, the greatest first.
    """
    scores = logits.float()
    if scoring == "softmax":
        scores = scores.softmax(-1)
    weights, experts = scores.topk(top_k, dim=-1)
    if scoring == "topk_softmax":
        return weights.softmax(-1), experts
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of group g times weight[g]^T: x [R, in] by group, weight [G, out, in] -> [R, out].

    ends: int32 [G], where each group's rows end (the sums of their counts up to it).
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].t(), out=out[start:end])
        start = end
    return out
