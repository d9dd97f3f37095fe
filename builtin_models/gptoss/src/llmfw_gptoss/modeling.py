"""gpt-oss (arXiv:2508.10925): a mixture of experts with biases and a clamped gated activation.

Every second layer attends within a window, and every head has a sink: a learned logit that takes
part in the softmax and stands for no key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmfw import DecoderSpec, GatedActivation, ModelConfig, MoEParams, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import GptOssConfig

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # fields of the configuration in newer transformers only


def clamped_swiglu(alpha: float, limit: float) -> GatedActivation:
    """(up + 1) * gate * sigmoid(alpha * gate), with gate cut above and up on both sides."""

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * alpha))

    cut = f"fminf(gate, {limit}f)"
    code = f"(fminf(fmaxf(up, -{limit}f), {limit}f) + 1.0f) * {cut} * sigmoid({alpha}f * {cut})"
    return GatedActivation(swiglu, code)


class GptOssForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with experts, whose weights are the softmax over the chosen ones.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[GptOssConfig]) -> None:
        config = model_config.pretrained_config
        alpha = getattr(config, "swiglu_alpha", SWIGLU_ALPHA)
        limit = getattr(config, "swiglu_limit", SWIGLU_LIMIT)
        spec = DecoderSpec.from_config(
            config,
            sinks=True,
            moe=MoEParams.from_config(config, scoring="topk_softmax", bias=True),
            activation=clamped_swiglu(float(alpha), float(limit)),
        )
        super().__init__(model_config, spec)
