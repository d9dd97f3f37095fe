"""Launcher of moe_route.cu."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import dense, pointer
from llmfw.ops.kernel import OpContext

WARPS = 4  # of a block, each with a token
LANES = 32
MAX_EXPERTS = 1024
SCORINGS = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}


def supports(context: OpContext) -> str | None:
    """A warp keeps all scores, and a lane one choice or one group."""
    if context["num_experts"] > MAX_EXPERTS:
        return f"serves up to {MAX_EXPERTS} experts, not {context['num_experts']}"
    if max(context["top_k"], context["num_groups"]) > LANES:
        return f"serves up to {LANES} choices and groups"
    return None


def moe_route(context: OpContext) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The op `moe_route` for one number of experts."""
    count = context["num_experts"]
    module = load("moe_route.cu", context.info.device, context.dtype, EXPERTS=count)
    launch = module.launcher("moe_route", "PPPPiiiiiiif")

    def call(
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
        logits = dense(logits)
        tokens = logits.shape[0]
        weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
        experts = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
        if tokens:
            launch(
                (-(-tokens // WARPS), 1, 1),
                (WARPS * LANES, 1, 1),
                weights.data_ptr(),
                experts.data_ptr(),
                logits.data_ptr(),
                pointer(bias),
                tokens,
                top_k,
                SCORINGS[scoring],
                int(renormalize),
                num_groups,
                top_groups,
                group_best,
                scale,
            )
        return weights, experts

    return call
