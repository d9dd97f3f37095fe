"""Mixtures of experts: routing, grouped products, the layer, its parameters and its weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from c_expressions import VALUES, value_of
from llmfw import ConfigError, DecoderSpec, Mapping, ModelConfig, WeightError, WeightMap
from llmfw.engine.model_runner import ModelRunner
from llmfw.layers import (
    MLP,
    Experts,
    GatedActivation,
    GatedMLP,
    Linear,
    MoE,
    MoEParams,
    stock_layer,
)
from llmfw.layers.activation import ACTIVATIONS, gated_code
from llmfw.models import bind_tree
from llmfw.models.weights import materialize
from llmfw.ops.reference_moe import grouped_linear, moe_route
from llmfw.weights import MemoryCheckpoint, load_weights, plan_weights

HIDDEN, WIDTH, COUNT, TOP_K = 8, 6, 5, 2


def config(**changes) -> ModelConfig:
    return ModelConfig(
        pretrained_config=None,
        layer_factory=lambda kind, role, cfg, layer_idx, spec: stock_layer(
            kind, role, cfg, layer_idx, spec
        ),
        **changes,
    )


def ready(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    bind_tree(layer, config(dtype=dtype))
    materialize(layer, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def one_by_one(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The definition: each token through its experts, one after the other."""
    rows = []
    for token in x:
        probs = (layer.gate.weight @ token).softmax(-1)
        weights, chosen = probs.topk(layer.moe.top_k)
        if layer.moe.renormalize:
            weights = weights / weights.sum()
        total = torch.zeros(HIDDEN)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
            total += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        if layer.shared_expert is not None:
            gate, up = (layer.shared_expert.gate_up_proj.weight @ token).chunk(2)
            shared = layer.shared_expert.down_proj.weight @ (F.silu(gate) * up)
            if layer.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(layer.shared_expert_gate.weight @ token)
            total += shared
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [{}, {"shared_size": 10}, {"shared_size": 4, "gated": True}])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_layer_is_the_weighted_sum_of_each_tokens_experts(shared: dict, renormalize: bool):
    moe = MoEParams(
        COUNT,
        TOP_K,
        WIDTH,
        renormalize=renormalize,
        shared_size=shared.get("shared_size"),
        shared_gated=shared.get("gated", False),
    )
    layer = ready(MoE(hidden_size=HIDDEN, moe=moe, config=config()))
    for tokens in (1, 2, 33):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(layer(x), one_by_one(layer, x), atol=1e-3, rtol=1e-4)


class OwnExperts(Experts):
    """Another package's, which knows of no `added`."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(x, weights, experts)


class OwnRouter(Linear):
    """Another package's, which multiplies float32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("shared", [None, 10])
def test_parts_with_a_forward_of_their_own_get_what_they_know(shared: int | None):
    def make(kind: str, role: str, cfg: ModelConfig, layer_idx: int | None, spec) -> nn.Module:
        if role == "experts":
            return OwnExperts(config=cfg, **spec)
        if role == "gate":
            return OwnRouter(**spec)
        return stock_layer(kind, role, cfg, layer_idx, spec)

    moe = MoEParams(COUNT, TOP_K, WIDTH, shared_size=shared, float32_router=True)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    layers = [
        ready(MoE(hidden_size=HIDDEN, moe=moe, config=each), torch.bfloat16)
        for each in (config(), replace(config(), layer_factory=make))
    ]
    expected, found = (layer(x) for layer in layers)
    assert isinstance(layers[1].experts, OwnExperts)
    torch.testing.assert_close(found, expected)


def test_experts_with_biases_and_an_activation_of_gate_and_up():
    def act(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gate) + up

    moe = MoEParams(COUNT, TOP_K, WIDTH, scoring="topk_softmax", bias=True)
    layer = ready(
        MoE(hidden_size=HIDDEN, moe=moe, activation=GatedActivation(act), config=config())
    )
    experts, names = layer.experts, {name for name, _ in layer.named_parameters()}
    assert {"gate.bias", "experts.gate_up_proj_bias", "experts.down_proj_bias"} <= names
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0))
    rows = []
    for token in x:
        logits = layer.gate.weight @ token + layer.gate.bias
        weights, chosen = logits.topk(TOP_K)
        total = torch.zeros(HIDDEN)
        for weight, expert in zip(weights.softmax(-1), chosen.tolist(), strict=True):
            both = experts.gate_up_proj[expert] @ token + experts.gate_up_proj_bias[expert]
            down = experts.down_proj[expert] @ act(*both.chunk(2))
            total += weight * (down + experts.down_proj_bias[expert])
        rows.append(total)
    torch.testing.assert_close(layer(x), torch.stack(rows), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_says_itself_in_c(name: str):
    for gate, up in VALUES:
        expected = ACTIVATIONS[name](torch.tensor(gate, dtype=torch.float64)) * up
        assert value_of(gated_code(name), gate, up) == pytest.approx(expected.item(), rel=1e-6)


def test_code_belongs_to_what_is_known_to_have_it():
    assert gated_code(F.silu) == gated_code("silu") == gated_code("swish")
    assert gated_code(F.gelu) == gated_code("gelu") != gated_code("gelu_pytorch_tanh")
    assert gated_code(lambda x: x) == ""
    assert gated_code(GatedActivation(lambda gate, up: gate + up)) == ""
    assert gated_code(GatedActivation(lambda gate, up: gate + up, "gate + up")) == "gate + up"


def test_a_gated_activation_in_other_layers():
    both = GatedActivation(lambda gate, up: gate.clamp(max=1) * (up + 1))
    mlp = ready(GatedMLP(hidden_size=8, intermediate_size=6, activation=both, config=config()))
    x = torch.randn(3, HIDDEN)
    gate, up = (x @ mlp.gate_up_proj.weight.t()).chunk(2, -1)
    expected = (gate.clamp(max=1) * (up + 1)) @ mlp.down_proj.weight.t()
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="no meaning in a plain MLP"):
        MLP(hidden_size=8, intermediate_size=6, activation=both, config=config())


def test_a_tokens_result_does_not_depend_on_its_batch():
    moe = MoEParams(COUNT, TOP_K, WIDTH)
    layer = ready(MoE(hidden_size=HIDDEN, moe=moe, config=config()))
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, atol=1e-4, rtol=1e-5)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu"])
def test_experts_take_any_activation_and_keep_the_models_dtype(act: str):
    experts = Experts(
        num_experts=COUNT,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        activation=act,
        config=config(),
    )
    ready(experts, torch.bfloat16)
    assert experts.gate_up_proj.dtype == torch.bfloat16
    x = torch.randn(3, HIDDEN).to(torch.bfloat16)
    weights, chosen = torch.ones(3, 1), torch.tensor([[4], [0], [4]])
    out = experts(x, weights, chosen)
    assert (out.shape, out.dtype) == ((3, HIDDEN), torch.bfloat16)
    assert torch.equal(experts(x[2:], weights[2:], chosen[2:]), out[2:])


def test_routing_by_softmax_before_and_after_the_choice():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    probs = logits.softmax(-1)[0]
    weights, experts = moe_route(logits, 2)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights[0], probs[[1, 2]])
    both = torch.tensor([3.0, 2.0]).softmax(-1)
    torch.testing.assert_close(moe_route(logits, 2, "softmax", True)[0][0], both)
    torch.testing.assert_close(moe_route(logits, 2, "topk_softmax")[0][0], both)


def test_routing_by_sigmoid_with_a_bias_that_counts_for_the_choice_alone():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    bias = torch.tensor([0.0, -1.0, 0.0, 0.9])
    chosen = logits.sigmoid()[0, [3, 2]]  # 0.5 + 0.9 before 0.88, 0.73 and 0.95 - 1
    weights, experts = moe_route(logits, 2, "sigmoid", bias=bias)
    assert experts.tolist() == [[3, 2]]
    torch.testing.assert_close(weights[0], chosen)
    weights, _ = moe_route(logits, 2, "sigmoid", True, bias, scale=2.5)
    torch.testing.assert_close(weights[0], 2.5 * chosen / chosen.sum())
    nothing = torch.full((1, 4), -200.0)
    assert moe_route(nothing, 2, "sigmoid", True)[0].tolist() == [[0.0, 0.0]]


def test_only_experts_of_the_best_groups_are_chosen():
    # groups (0, 1), (2, 3), (4, 5): bests 5, 4, 3; sums of two 5, 7.5, 5.5
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.5, 3.0, 2.5]])
    by_best = {"scoring": "topk_softmax", "num_groups": 3, "top_groups": 2}
    assert moe_route(logits, 3, **by_best)[1].tolist() == [[0, 2, 3]]
    assert moe_route(logits, 3, **by_best, group_best=2)[1].tolist() == [[2, 3, 4]]
    assert moe_route(logits, 2, num_groups=3, top_groups=1)[1].tolist() == [[0, 1]]
    weights, _ = moe_route(logits, 2, num_groups=3, top_groups=1)
    torch.testing.assert_close(weights[0], logits.softmax(-1)[0, :2])


def test_the_layer_routes_as_it_is_told():
    moe = MoEParams(
        6,
        2,
        WIDTH,
        scoring="sigmoid",
        renormalize=True,
        scale=2.5,
        num_groups=3,
        top_groups=2,
        group_best=2,
        score_bias=True,
        float32_router=True,
        shared_size=4,
        shared_bias=True,
    )
    layer = ready(MoE(hidden_size=HIDDEN, moe=moe, config=config()), torch.bfloat16)
    assert layer.gate.weight.dtype == layer.e_score_correction_bias.dtype == torch.float32
    assert layer.shared_expert.down_proj.bias is not None
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    routing = (True, layer.e_score_correction_bias, 3, 2, 2, 2.5)
    weights, experts = moe_route(x.float() @ layer.gate.weight.t(), 2, "sigmoid", *routing)
    expected = layer.experts(x, weights, experts) + layer.shared_expert(x)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected)


def test_groups_may_be_empty_and_rows_none():
    x, weight = torch.randn(4, HIDDEN), torch.randn(3, WIDTH, HIDDEN)
    out = grouped_linear(x, weight, torch.tensor([0, 3, 4], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat((x[:3] @ weight[1].t(), x[3:] @ weight[2].t())))
    none = grouped_linear(x[:0], weight, torch.zeros(3, dtype=torch.int32))
    assert none.shape == (0, WIDTH)


def test_parameters_are_read_by_the_usual_names_and_checked():
    raw = SimpleNamespace(num_local_experts=8, num_experts_per_tok=2, intermediate_size=64)
    assert MoEParams.from_config(raw) == MoEParams(8, 2, 64)
    raw = SimpleNamespace(
        n_routed_experts=8,
        num_experts_per_tok=2,
        intermediate_size=64,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    )
    assert MoEParams.from_config(raw, shared_size=4) == MoEParams(
        8, 2, 16, renormalize=True, shared_size=4
    )
    with pytest.raises(ConfigError, match="does not say num_experts_per_tok"):
        MoEParams.from_config(SimpleNamespace(num_experts=8, intermediate_size=64))
    with pytest.raises(ConfigError, match="scoring 'dice'"):
        MoEParams(8, 2, 16, scoring="dice")
    raw.routed_scaling_factor = 2.5
    assert MoEParams.from_config(raw).scale == 2.5
    with pytest.raises(ConfigError, match="9 of 8"):
        MoEParams(8, 9, 16)
    for groups in ({"num_groups": 3}, {"num_groups": 4, "top_groups": 5}, {"group_best": 9}):
        with pytest.raises(ConfigError, match=r"8 experts are not \d groups"):
            MoEParams(8, 2, 16, **groups)
    with pytest.raises(ConfigError, match="1 groups of 2 experts are too few to choose 3"):
        MoEParams(8, 3, 16, num_groups=4)
    with pytest.raises(ConfigError, match="one tensor-parallel rank"):
        MoE(
            hidden_size=HIDDEN,
            moe=MoEParams(COUNT, TOP_K, WIDTH),
            config=config(mapping=Mapping(world_size=2, tp_size=2)),
        )


def test_a_spec_says_which_layers_have_experts():
    moe = MoEParams(COUNT, TOP_K, WIDTH)
    sizes = {"hidden_size": 8, "vocab_size": 9, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    spec = DecoderSpec(**sizes, num_layers=2, intermediate_size=16, moe=moe)
    assert [spec.moe_of(layer) for layer in range(2)] == [moe, moe]
    spec = spec.replace(moe_layers=(False, True))
    assert [spec.moe_of(layer) for layer in range(2)] == [None, moe]
    with pytest.raises(ConfigError, match="1 moe_layers for 2 layers"):
        spec.replace(moe_layers=(True,))


def numbered_experts() -> dict[str, torch.Tensor]:
    shapes = {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"block.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator)
        for expert in range(COUNT)
        for name, shape in shapes.items()
    }


def experts_in_a_block(**changes) -> nn.Module:
    block = nn.Module()
    block.block = nn.Module()
    sizes = {"num_experts": COUNT, "hidden_size": HIDDEN, "intermediate_size": WIDTH}
    block.block.experts = Experts(**sizes, **changes, config=config())
    bind_tree(block, config())
    return block


EXPERTS_MAP = WeightMap().stack_experts(
    "block.experts", "block.experts.{e}", COUNT, "w1", "w3", "w2"
)


def test_numbered_experts_are_stacked():
    model, tensors = experts_in_a_block(), numbered_experts()
    checkpoint = MemoryCheckpoint(tensors)
    load_weights(model, plan_weights(model, checkpoint, EXPERTS_MAP), checkpoint)
    loaded = model.block.experts
    for expert in range(COUNT):
        names = [f"block.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2")]
        gate, up, down = (tensors[name] for name in names)
        assert torch.equal(loaded.gate_up_proj[expert], torch.cat((gate, up)))
        assert torch.equal(loaded.down_proj[expert], down)


def test_biases_of_numbered_experts_are_stacked():
    generator = torch.Generator().manual_seed(1)
    tensors = numbered_experts()
    for name in list(tensors):
        bias = torch.randn(tensors[name].shape[0], generator=generator)
        tensors[name.replace(".weight", ".bias")] = bias
    model, checkpoint = experts_in_a_block(bias=True), MemoryCheckpoint(tensors)
    load_weights(model, plan_weights(model, checkpoint, EXPERTS_MAP), checkpoint)
    loaded = model.block.experts
    for expert in range(COUNT):
        names = [f"block.experts.{expert}.{name}.bias" for name in ("w1", "w3", "w2")]
        gate, up, down = (tensors[name] for name in names)
        assert torch.equal(loaded.gate_up_proj_bias[expert], torch.cat((gate, up)))
        assert torch.equal(loaded.down_proj_bias[expert], down)


def test_a_lacking_expert_is_named():
    tensors = numbered_experts()
    del tensors["block.experts.3.w3.weight"]
    with pytest.raises(WeightError, match=r"missing +block\.experts\.3\.w3\.weight"):
        plan_weights(experts_in_a_block(), MemoryCheckpoint(tensors), EXPERTS_MAP)


def test_a_loop_over_experts_is_not_captured_in_a_cuda_graph():
    """The reference of grouped_linear waits for the device to learn where groups end."""
    runner = object.__new__(ModelRunner)
    runner._backend = SimpleNamespace(reference_only=False)
    runner.state_specs = {}
    runner.model = SimpleNamespace(model_config=config())
    assert runner._capturable()
    runner.model.model_config.ops.resolve(
        "grouped_linear", torch.float32, num_groups=2, in_features=8, out_features=8
    )
    assert not runner._capturable()
