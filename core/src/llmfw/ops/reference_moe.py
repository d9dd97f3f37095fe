"""The torch references of a mixture of experts: routing, products by group, the weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import torch


def moe_route(
    logits: torch.Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts a token by logits [T, E]: weights float32, experts int64 [T, k].

    scoring: "softmax" weighs by the softmax over all experts, "sigmoid" by each one's sigmoid,
    "topk_softmax" by the softmax over the chosen logits. renormalize makes the chosen weights of
    the first two sum to one. bias: float32 [E], added to the scores for the choice alone.
    num_groups: the experts are in so many groups of neighbours, and only those of the best
    top_groups can be chosen; a group's score is the sum of its group_best best. scale: factor of
    the weights at last.

    In float32; the order of a token's experts is by the score they are chosen by, the greatest
    first.
    """
    scores = logits.float()
    if scoring == "softmax":
        scores = scores.softmax(-1)
    elif scoring == "sigmoid":
        scores = scores.sigmoid()
    wanted = scores if bias is None else scores + bias
    if num_groups > 1:
        wanted = _best_groups(wanted, num_groups, top_groups, group_best)
    weights, experts = wanted.topk(top_k, dim=-1)
    if bias is not None:
        weights = scores.gather(-1, experts)
    if scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + 1e-20 if scoring == "sigmoid" else total)  # all may be zero
    return weights if scale == 1.0 else weights * scale, experts


def _best_groups(
    scores: torch.Tensor, num_groups: int, top_groups: int, group_best: int
) -> torch.Tensor:
    """Scores [T, E] with -inf in place of all that are not in a token's best groups."""
    grouped = scores.unflatten(-1, (num_groups, -1))  # [tokens, groups, experts of a group]
    group_scores = grouped.topk(group_best, dim=-1).values.sum(-1)
    best = group_scores.topk(top_groups, dim=-1).indices
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    open_only: torch.Tensor = grouped.masked_fill(closed[..., None], float("-inf"))
    return open_only.flatten(-2)


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


def moe_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    act_and_mul: Callable[[torch.Tensor], torch.Tensor],
    added: torch.Tensor | None = None,
    up_product: Callable[..., torch.Tensor] = grouped_linear,
    down_product: Callable[..., torch.Tensor] = grouped_linear,
) -> torch.Tensor:
    """The weighted sum of each token's experts, which are gated MLPs: x [T, hidden] -> the same.

    weights: float32 [T, k]; experts: int64 [T, k]. gate_up: [E, 2 * inner, hidden], gate | up;
    down: [E, hidden, inner]; their biases [E, 2 * inner] and [E, hidden]. act_and_mul: gate | up
    [rows, 2 * inner] to [rows, inner], the same as the context's `code` where that is not empty.
    added: [T, hidden], added to the result, as a shared expert's is. The products are those of
    `grouped_linear` by any kernel.
    """
    by_expert, order = experts.flatten().sort(stable=True)  # [T * k]
    every = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(by_expert, every, right=True).to(torch.int32)
    rows = x[order // experts.shape[1]]  # [T * k, hidden]
    inner = up_product(rows, gate_up, ends)
    if gate_up_bias is not None:
        inner += gate_up_bias[by_expert]
    sorted_out = down_product(act_and_mul(inner), down, ends)
    if down_bias is not None:
        sorted_out += down_bias[by_expert]
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out  # back in the tokens' order: the sum is the same in every run
    total = (out.view(*experts.shape, x.shape[-1]) * weights[..., None]).sum(1).to(x.dtype)
    return total if added is None else total + added
