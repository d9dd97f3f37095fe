"""DeepSeek V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).

The stock decoder with latent attention and, after some dense layers, a mixture of experts. V2
chooses experts by softmax, V3 by sigmoid with a learned correction; large ones choose groups first.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import DeepseekV2Config, DeepseekV3Config

from llmfw import (
    ConfigError,
    DecoderSpec,
    MLAParams,
    ModelConfig,
    MoEParams,
    RopeParams,
    StockDecoderForCausalLM,
)

AnyDeepseekConfig: TypeAlias = DeepseekV2Config | DeepseekV3Config


class DeepseekForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with the family's switches.

    Args:
        model_config: The model's configuration.

    Raises:
        ConfigError: If the configuration routes in a way that no published model does.
    """

    def __init__(self, model_config: ModelConfig[AnyDeepseekConfig]) -> None:
        config: Any = model_config.pretrained_config
        interleaved = getattr(config, "rope_interleave", True)
        spec = DecoderSpec.from_config(
            config,
            mla=MLAParams.from_config(config),
            rope=RopeParams.from_config(config, interleaved=interleaved),
            moe=experts_of(config),
            moe_layers=tuple(has_experts(config, i) for i in range(config.num_hidden_layers)),
        )
        super().__init__(model_config, spec)


def experts_of(config: Any) -> MoEParams:
    """The mixture of experts; the router is in float32 in both."""
    shared = {"shared_bias": getattr(config, "mlp_bias", False), "float32_router": True}
    if config.n_shared_experts:
        shared["shared_size"] = config.n_shared_experts * config.moe_intermediate_size
    groups = {"num_groups": config.n_group or 1, "top_groups": config.topk_group or 1}
    if config.model_type == "deepseek_v3":
        require(config, "scoring_func", "sigmoid")
        require(config, "topk_method", "noaux_tc")
        return MoEParams.from_config(
            config, scoring="sigmoid", score_bias=True, group_best=2, **groups, **shared
        )
    require(config, "scoring_func", "softmax")
    require(config, "topk_method", "greedy", "group_limited_greedy")
    require(config, "norm_topk_prob", False)
    if config.topk_method == "greedy":
        groups = {}
    return MoEParams.from_config(config, **groups, **shared)


def has_experts(config: Any, layer_idx: int) -> bool:
    """Whether a layer has the mixture of experts; the others have a plain gated MLP."""
    every = layer_idx % getattr(config, "moe_layer_freq", 1) == 0
    return every and layer_idx >= config.first_k_dense_replace


def require(config: Any, name: str, *values: Any) -> None:
    """Refuse a setting that transformers ignores and that the published code would follow."""
    value = getattr(config, name, None)
    if value is not None and value not in values:
        raise ConfigError(
            f"{config.model_type} with {name}={value!r} is not supported",
            hint=f"published models have {' or '.join(map(repr, values))}",
        )
