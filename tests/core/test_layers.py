"""Layers: two phases, declared shards, what each computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmfw.config import Mapping, ModelConfig
from llmfw.errors import ConfigError, WeightError
from llmfw.layers import (
    MLP,
    Attention,
    ColumnLinear,
    Embedding,
    GatedMLP,
    GatedRMSNorm,
    LayerNorm,
    Linear,
    LMHead,
    PositionalEmbeddingParams,
    PositionEmbeddingType,
    RMSNorm,
    RopeParams,
    RotaryEmbedding,
    RowLinear,
    stock_layer,
)
from llmfw.models import bind_tree, finish_loading
from llmfw.models.weights import materialize
from llmfw.ops import DeviceInfo, Kernel, OpTable
from llmfw.weights.slots import collect_slots


def config(**settings) -> ModelConfig:
    pretrained = SimpleNamespace(max_position_embeddings=64)
    return ModelConfig(pretrained_config=pretrained, layer_factory=stock_layer, **settings)


def ready(module: torch.nn.Module, cfg: ModelConfig | None = None) -> torch.nn.Module:
    """Bound, with random weights."""
    cfg = cfg or config()
    bind_tree(module, cfg)
    materialize(module, cfg.device)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    finish_loading(module)
    return module


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_a_linear_only_declares_until_it_is_bound():
    linear = Linear(8, 4)
    assert linear.weight.is_meta
    with pytest.raises(ConfigError, match="before the model was built"):
        linear(X)


def test_linear_computes_and_takes_the_models_dtype():
    linear = ready(Linear(8, 4))
    torch.testing.assert_close(linear(X), X @ linear.weight.T + linear.bias)
    assert ready(Linear(8, 4), config(dtype=torch.bfloat16)).weight.dtype == torch.bfloat16
    assert ready(Linear(8, 4, bias=False)).bias is None


def test_shards_must_add_up():
    fused = Linear(8, 6, shards=(("a", 4), ("b", 2)))
    assert [(shard.name, shard.dim0) for shard in fused.weight_shards] == [("a", 4), ("b", 2)]
    with pytest.raises(ConfigError, match="do not add up to out_features 7"):
        Linear(8, 7, shards=(("a", 4), ("b", 2)))


def test_column_and_row_parallel_split_over_the_ranks():
    half = Mapping(world_size=2, rank=1, tp_size=2)
    assert ColumnLinear(8, 6, mapping=half).weight.shape == (3, 8)
    assert RowLinear(8, 6, mapping=half).weight.shape == (6, 4)
    with pytest.raises(ConfigError, match="width 7 cannot be split over 2 ranks"):
        ColumnLinear(8, 7, mapping=half)
    with pytest.raises(ConfigError, match="parallel='rows'"):
        Linear(8, 8, parallel="rows")


def test_load_weights_of_one_layer_fuses_its_parts():
    fused = ready(Linear(8, 6, bias=False, shards=(("a", 4), ("b", 2))))
    a, b = torch.randn(4, 8), torch.randn(2, 8)
    fused.load_weights([{"weight": a}, {"weight": b}])
    assert torch.equal(fused.weight, torch.cat((a, b)))
    with pytest.raises(WeightError, match=r"has shape \[6, 8\], its tensors give \[4, 8\]"):
        fused.load_weights([{"weight": a}])
    with pytest.raises(WeightError, match=r"Linear.weight is missing from parts \[1\] of 2"):
        fused.load_weights([{"weight": a}, {}])


def test_embedding_and_tied_head_share_one_parameter():
    module = torch.nn.Module()
    module.embed_tokens = Embedding(10, 8)
    module.lm_head = LMHead(10, 8)
    module.lm_head.tie_weights(module.embed_tokens)
    ready(module)
    assert module.lm_head.weight is module.embed_tokens.weight
    assert torch.equal(module.embed_tokens(torch.tensor([3])), module.embed_tokens.weight[3:4])
    torch.testing.assert_close(module.lm_head(X), X @ module.embed_tokens.weight.T)


def test_an_embedding_scales_its_rows_in_their_dtype():
    embedding = ready(Embedding(10, 8, scale=2.0**0.5), config(dtype=torch.bfloat16))
    factor = torch.tensor(2.0**0.5, dtype=torch.bfloat16)
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:4] * factor)


def test_parts_of_a_vocabulary_add_up_to_the_whole():
    whole, ids = ready(Embedding(10, 8, scale=3.0)), torch.tensor([4, 0, 9, 5, 4])
    total = torch.zeros(5, 8)
    for rank in range(2):
        mapping = Mapping(world_size=2, rank=rank, tp_size=2)
        split = {"parallel": "column", "mapping": mapping, "reduce_output": False}
        part = ready(Embedding(10, 8, scale=3.0, **split))
        (slot,) = collect_slots(part, mapping).slots
        (cut,) = (each.cut for each in slot.parts)
        assert slot.parts[0].shape == (10, 8)
        part.weight.data.copy_(whole.weight[cut.start : cut.stop])
        own = part(ids)
        assert torch.equal(own[(ids // 5) != rank], torch.zeros(int((ids // 5 != rank).sum()), 8))
        total += own
    assert torch.equal(total, whole(ids))
    with pytest.raises(ConfigError, match="9 rows cannot be split over 2 ranks"):
        Embedding(9, 8, parallel="column", mapping=mapping)
    with pytest.raises(ConfigError, match="parallel='row'"):
        Embedding(10, 8, parallel="row")


def test_a_float32_layer_takes_what_the_model_computes_in():
    linear = ready(Linear(8, 4, dtype=torch.float32), config(dtype=torch.bfloat16))
    x = X.to(torch.bfloat16)
    expected = x.float() @ linear.weight.T + linear.bias
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x.float()), expected)


def test_rms_norm_with_and_without_residual_and_offset():
    norm = ready(RMSNorm(8, eps=1e-3))
    rms = X.square().mean(-1, keepdim=True).add(1e-3).sqrt()
    torch.testing.assert_close(norm(X), X / rms * norm.weight)
    both, total = norm(X, X)
    torch.testing.assert_close(total, 2 * X)
    torch.testing.assert_close(both, norm(2 * X))
    shifted = ready(RMSNorm(8, eps=1e-3, offset=1.0))
    torch.testing.assert_close(shifted(X), X / rms * (1 + shifted.weight))


def test_rms_norm_adds_to_a_stream_in_float32():
    norm = ready(RMSNorm(8), config(dtype=torch.bfloat16))
    x, stream = X.bfloat16(), X.flip(0) / 3  # has bits that bfloat16 has not
    normed, total = norm(x.clone(), stream.clone())
    assert normed.dtype is torch.bfloat16
    assert torch.equal(total, x.float() + stream)
    assert torch.equal(normed, norm(total.bfloat16()))


@pytest.mark.parametrize("groups", [1, 2])
def test_gated_rms_norm_normalises_each_group(groups: int):
    norm = ready(GatedRMSNorm(8, eps=1e-3, groups=groups))
    gate = X.flip(0)
    parts = (X * F.silu(gate)).chunk(groups, dim=-1)
    normed = [part / part.square().mean(-1, keepdim=True).add(1e-3).sqrt() for part in parts]
    torch.testing.assert_close(norm(X, gate), torch.cat(normed, dim=-1) * norm.weight)


def test_layer_norm_with_and_without_parameters():
    norm = ready(LayerNorm(8, eps=1e-3))
    torch.testing.assert_close(norm(X), F.layer_norm(X, (8,), norm.weight, norm.bias, 1e-3))
    assert ready(LayerNorm(8, bias=False)).bias is None
    bare = ready(LayerNorm(8, elementwise_affine=False))
    torch.testing.assert_close(bare(X, X)[0], F.layer_norm(2 * X, (8,)))


@pytest.mark.parametrize(
    ("name", "act"),
    [("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu), ("relu2", lambda x: F.relu(x) ** 2)],
)
def test_gated_and_plain_mlp(name: str, act):
    gated = ready(
        GatedMLP(hidden_size=8, intermediate_size=6, activation=name, config=config(), bias=True)
    )
    gate, up = gated.gate_up_proj(X).chunk(2, dim=-1)
    torch.testing.assert_close(gated(X), gated.down_proj(act(gate) * up))
    plain = ready(
        MLP(
            hidden_size=8,
            intermediate_size=6,
            activation=name,
            config=config(),
            up_name="fc1",
            down_name="fc2",
        )
    )
    torch.testing.assert_close(plain(X), plain.fc2(act(plain.fc1(X))))
    assert {key.split(".")[0] for key in plain.state_dict()} == {"fc1", "fc2"}


def fused_in_wrong_order(context):
    def call(x, weight, bias=None):
        up, gate = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return call


def test_a_kernel_for_gated_linear_serves_the_gated_mlp_whose_weights_it_can_read():
    kernel = Kernel("gated_linear", "fake.fused", f"{__name__}:fused_in_wrong_order")
    ops = OpTable(DeviceInfo(torch.device("cpu"), frozenset()), (kernel,))
    cfg = config(ops=ops)
    mlps = [
        ready(GatedMLP(hidden_size=8, intermediate_size=6, activation=act, config=cfg), cfg)
        for act in ("silu", "gelu")
    ]
    fused, plain = mlps
    up, gate = fused.gate_up_proj(X).chunk(2, dim=-1)  # the fake's order
    torch.testing.assert_close(fused(X), fused.down_proj(torch.nn.functional.silu(gate) * up))
    gate, up = plain.gate_up_proj(X).chunk(2, dim=-1)
    torch.testing.assert_close(plain(X), plain.down_proj(torch.nn.functional.gelu(gate) * up))


def test_unknown_activation_and_layer_kind_name_the_known_ones():
    with pytest.raises(ConfigError, match="'sine' is not known"):
        MLP(hidden_size=8, intermediate_size=6, activation="sine", config=config())
    with pytest.raises(ConfigError, match="no stock layer of kind 'pooler'"):
        stock_layer("pooler", "pooler", config(), None, {})


def test_rotary_tables_are_shared_between_equal_layers():
    cfg = config(max_model_len=32)
    pair = torch.nn.ModuleList([RotaryEmbedding(RopeParams(dim=8)) for _ in range(2)])
    other = RotaryEmbedding(RopeParams(dim=8, theta=5.0))
    ready(torch.nn.ModuleList([pair, other]), cfg)
    assert pair[0].cos_sin is pair[1].cos_sin
    assert pair[0].cos_sin.shape == (32, 8)
    assert not torch.equal(pair[0].cos_sin, other.cos_sin)
    q = torch.randn(3, 2, 8)
    rotated, _ = pair[0](torch.tensor([0, 1, 2]), q, q)
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(rotated[0], q[0])


def test_attention_declares_its_cache_and_refuses_odd_heads():
    rope = PositionalEmbeddingParams(PositionEmbeddingType.rope_gpt_neox, RopeParams(dim=4))
    attention = Attention(
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        pos_embd_params=rope,
        layer_idx=3,
        config=config(),
        sliding_window=7,
    )
    spec = attention.cache_spec()
    assert (spec.kind, spec.window, spec.num_kv_heads, spec.head_dim) == ("sliding", 7, 2, 4)
    assert spec.bytes_per_token == 2 * 2 * 4 * 4
    with pytest.raises(ConfigError, match="4 query heads, 3 key/value heads and 1 ranks"):
        Attention(
            hidden_size=8,
            num_attention_heads=4,
            num_key_value_heads=3,
            layer_idx=0,
            config=config(),
        )
    with pytest.raises(ConfigError, match="needs layer_idx"):
        Attention(hidden_size=8, num_attention_heads=4, layer_idx=None, config=config())
    with pytest.raises(ConfigError, match="needs rope parameters"):
        PositionalEmbeddingParams(PositionEmbeddingType.rope_gptj)


def test_make_outside_of_build_says_what_to_do():
    bare = ModelConfig(pretrained_config=SimpleNamespace())
    with pytest.raises(ConfigError, match=r"use llmfw\.models\.build"):
        bare.make("linear", "x", in_features=1, out_features=1)
