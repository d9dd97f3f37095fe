"""A mixture of experts: a router chooses a few gated MLPs for each token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.errors import ConfigError
from llmfw.layers.activation import Activation, GatedActivation, gated_code, gated_product
from llmfw.layers.layer import Layer
from llmfw.layers.linear import Linear
from llmfw.ops.reference_moe import moe_experts

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

SCORINGS = ("softmax", "topk_softmax", "sigmoid")


@dataclass(frozen=True)
class MoEParams:
    """What a mixture of experts varies in.

    num_experts, top_k: how many there are, and how many a token goes through.
    intermediate_size: of each expert.
    scoring: "softmax" (over all experts, then the top_k), "topk_softmax" (the reverse), "sigmoid".
    renormalize: with "softmax" and "sigmoid", the chosen weights are made to sum to one.
    scale: factor of the chosen weights, at last.
    num_groups, top_groups: experts are in groups of neighbours, and only those of a token's best
        top_groups can be chosen; a group's score is the sum of its group_best best.
    score_bias: each expert has a learned bias that counts for the choice alone.
    float32_router: the router's product is in float32 whatever the model's dtype.
    shared_size: intermediate size of an expert that all tokens go through, None for none.
    shared_bias: whether it has biases.
    shared_gated: its output is multiplied by the sigmoid of a linear layer's single output.
    bias: the router and the routed experts' linear layers have biases.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    score_bias: bool = False
    float32_router: bool = False
    shared_size: int | None = None
    shared_bias: bool = False
    shared_gated: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ConfigError(
                f"scoring {self.scoring!r} is not known", hint=f"known: {', '.join(SCORINGS)}"
            )
        if not 0 < self.top_k <= self.num_experts:
            raise ConfigError(f"a token cannot go through {self.top_k} of {self.num_experts}")
        size, rest = divmod(self.num_experts, self.num_groups)
        if rest or not 0 < self.top_groups <= self.num_groups or self.group_best > size:
            raise ConfigError(
                f"{self.num_experts} experts are not {self.num_groups} groups of which "
                f"{self.top_groups} are chosen by their {self.group_best} best"
            )
        if self.top_k > self.top_groups * size:
            raise ConfigError(
                f"{self.top_groups} groups of {size} experts are too few to choose {self.top_k}"
            )

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> MoEParams:
        """Read a transformers configuration by its usual field names.

        Args:
            config: The configuration object.
            **changes: Fields that the configuration does not tell.

        Raises:
            ConfigError: If it does not say how many experts a token goes through.
        """
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        counts = [getattr(config, name) for name in names if getattr(config, name, None)]
        fields: dict[str, Any] = {
            "num_experts": counts[0] if counts else 0,
            "top_k": getattr(config, "num_experts_per_tok", None),
            "intermediate_size": getattr(config, "moe_intermediate_size", None)
            or config.intermediate_size,
            "renormalize": bool(getattr(config, "norm_topk_prob", False)),
            "scale": getattr(config, "routed_scaling_factor", None) or 1.0,
        }
        fields |= changes
        if fields["top_k"] is None:
            raise ConfigError("the configuration does not say num_experts_per_tok")
        return cls(**fields)


class Experts(Layer):
    """Gated MLPs of one shape, their weights stacked: gate_up_proj [E, 2I, H], down_proj [E, H, I].

    With `bias` there are gate_up_proj_bias [E, 2I] and down_proj_bias [E, H] too. A weight map's
    `stack_experts` fills them from a checkpoint that numbers its experts.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: Function, its name in configurations, or a `GatedActivation`.
        bias: Whether the linear layers have biases.
        config: The model's configuration.

    Raises:
        ConfigError: With more than one tensor-parallel rank.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Activation | GatedActivation = "silu",
        bias: bool = False,
        config: ModelConfig[Any],
    ) -> None:
        super().__init__()
        if config.mapping.tp_size > 1:
            raise ConfigError("a mixture of experts runs on one tensor-parallel rank only")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.act_name = activation
        self.has_bias = bias
        self._declare(config.dtype)

    def _declare(self, dtype: torch.dtype) -> None:
        experts, hidden, width = self.num_experts, self.hidden_size, self.intermediate_size
        self.gate_up_proj = _empty(experts, 2 * width, hidden, dtype=dtype)
        self.down_proj = _empty(experts, hidden, width, dtype=dtype)
        if self.has_bias:
            self.gate_up_proj_bias = _empty(experts, 2 * width, dtype=dtype)
            self.down_proj_bias = _empty(experts, hidden, dtype=dtype)

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the weights the model's dtype, resolve the kernel of all, else both products."""
        self._declare(config.dtype)
        self._act_and_mul = gated_product(self.act_name, config, self.intermediate_size)
        run = config.ops.find(
            "moe_experts",
            config.dtype,
            gated_code(self.act_name),
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            bias=int(self.has_bias),
        )
        if run is None:
            run = functools.partial(
                moe_experts,
                up_product=self._product(config, self.hidden_size, 2 * self.intermediate_size),
                down_product=self._product(config, self.intermediate_size, self.hidden_size),
            )
        self._run: Callable[..., torch.Tensor] = run

    def _product(
        self, config: ModelConfig[Any], in_features: int, out_features: int
    ) -> Callable[..., torch.Tensor]:
        return config.ops.resolve(
            "grouped_linear",
            config.dtype,
            num_groups=self.num_experts,
            in_features=in_features,
            out_features=out_features,
        )

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [tokens, hidden_size].
            weights: float32 [tokens, top_k].
            experts: int64 [tokens, top_k].
            added: [tokens, hidden_size], added to the sum.

        Returns:
            [tokens, hidden_size].
        """
        return self._run(
            x,
            weights,
            experts,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_bias if self.has_bias else None,
            self.down_proj_bias if self.has_bias else None,
            self._act_and_mul,
            added,
        )

    def extra_repr(self) -> str:
        """Shape, for print(model)."""
        return f"{self.num_experts} x ({self.hidden_size}, {self.intermediate_size})"


class MoE(Layer):
    """Routed experts, and a shared one where the model has it.

    The submodules are `gate` (hidden states -> a logit for each expert), `experts`, and where there
    is a shared expert `shared_expert` and `shared_expert_gate`. With a score bias there is
    `e_score_correction_bias`, float32 [experts].

    Args:
        hidden_size: Width of x.
        moe: What the mixture varies in.
        activation: Function, its name in configurations, or a `GatedActivation`.
        config: The model's configuration.
        layer_idx: Index of the decoder layer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        moe: MoEParams,
        activation: str | Activation | GatedActivation = "silu",
        config: ModelConfig[Any],
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.gate = config.make(
            "linear",
            "gate",
            layer_idx=layer_idx,
            in_features=hidden_size,
            out_features=moe.num_experts,
            bias=moe.bias,
            dtype=torch.float32 if moe.float32_router else None,
        )
        # A part with a `forward` of its own gets what it always got.
        own_gate = type(self.gate).forward is Linear.forward
        self._gate_widens = own_gate or not moe.float32_router
        self.e_score_correction_bias: torch.Tensor | None
        bias = _empty(moe.num_experts, dtype=torch.float32) if moe.score_bias else None
        self.register_parameter("e_score_correction_bias", bias)
        self.experts = config.make(
            "experts",
            "experts",
            layer_idx=layer_idx,
            num_experts=moe.num_experts,
            hidden_size=hidden_size,
            intermediate_size=moe.intermediate_size,
            activation=activation,
            bias=moe.bias,
        )
        self._experts_add = type(self.experts).forward is Experts.forward
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Module | None = None
        if moe.shared_size is not None:
            self.shared_expert = config.make(
                "mlp",
                "shared_expert",
                layer_idx=layer_idx,
                hidden_size=hidden_size,
                intermediate_size=moe.shared_size,
                bias=moe.shared_bias,
                activation=activation,
            )
            if moe.shared_gated:
                self.shared_expert_gate = config.make(
                    "linear",
                    "shared_expert_gate",
                    layer_idx=layer_idx,
                    in_features=hidden_size,
                    out_features=1,
                    bias=False,
                )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the choice of experts."""
        self._route: Callable[..., tuple[torch.Tensor, torch.Tensor]] = config.ops.resolve(
            "moe_route",
            torch.float32 if self.moe.float32_router else config.dtype,
            num_experts=self.moe.num_experts,
            top_k=self.moe.top_k,
            num_groups=self.moe.num_groups,
        )

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        moe, shared = self.moe, None
        if self.shared_expert is not None:
            shared = self.shared_expert(x, **kwargs)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
        weights, experts = self._route(
            self.gate(x if self._gate_widens else x.float()),
            moe.top_k,
            moe.scoring,
            moe.renormalize,
            self.e_score_correction_bias,
            moe.num_groups,
            moe.top_groups,
            moe.group_best,
            moe.scale,
        )
        if self._experts_add:
            return self.experts(x, weights, experts, shared)  # type: ignore[no-any-return]
        routed = self.experts(x, weights, experts)
        return routed if shared is None else routed + shared  # type: ignore[no-any-return]


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False)
