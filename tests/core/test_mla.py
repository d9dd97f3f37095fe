"""Multi-head latent attention: absorbed is what expanded would be, whatever the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmfw import MLA, ConfigError, Mapping, MLAParams, ModelConfig, RopeParams
from llmfw.attention.backend import get_attention_backend
from llmfw.engine.model_runner import ModelRunner
from llmfw.kernels.cupy.paged_decode import supports
from llmfw.layers import RMSNorm, stock_layer
from llmfw.layers.latent import LatentProjection
from llmfw.models import bind_tree
from llmfw.models.build import finish_loading
from llmfw.models.weights import materialize
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, OpContext
from llmfw.ops.reference import apply_rope, rms_norm
from llmfw.ops.table import OpTable
from llmfw.weights import MemoryCheckpoint, load_weights, plan_weights

HIDDEN, HEADS = 32, 4
CPU = torch.device("cpu")
SIZES = MLAParams(kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8)
ROPE = RopeParams(dim=6, max_positions=64, interleaved=True)


def config(**changes) -> ModelConfig:
    return ModelConfig(
        pretrained_config=None,
        layer_factory=lambda kind, role, cfg, layer_idx, spec: stock_layer(
            kind, role, cfg, layer_idx, spec
        ),
        **{"max_model_len": 64, "block_size": 4, **changes},
    )


def made(mla: MLAParams = SIZES, cfg: ModelConfig | None = None, **changes) -> MLA:
    arguments = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "layer_idx": 0, "rope": ROPE}
    return MLA(mla=mla, config=cfg or config(), **{**arguments, **changes})


def ready(layer: MLA) -> MLA:
    bind_tree(layer, config())
    materialize(layer, CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    finish_loading(layer)
    return layer


def run(layer: MLA, hidden: torch.Tensor, *lengths: int) -> torch.Tensor:
    """The layer over a batch of whole prompts."""
    requests = tuple((length, length) for length in lengths)
    generator = torch.Generator().manual_seed(1)
    metadata, _, blocks = paged_batch(requests, len(requests), 4, generator, CPU)
    cache = get_attention_backend("auto").allocate(layer.cache_spec(), blocks, 4, CPU)
    metadata = replace(metadata, caches={0: cache})
    return layer(metadata.positions, hidden, metadata)


def expanded(layer: MLA, hidden: torch.Tensor) -> torch.Tensor:
    """The definition: keys and values of every head, for one prompt."""
    mla, tokens = layer.mla, hidden.shape[0]
    q = layer._queries(hidden).view(tokens, HEADS, mla.qk_head_dim)
    kv = layer.kv_a_proj_with_mqa(hidden)
    latent = rms_norm(kv[:, : mla.kv_lora_rank], layer.kv_a_layernorm.weight, 1e-6)
    cos, sin = layer.rotary_emb.cos_sin[:tokens].chunk(2, dim=-1)
    up = (latent @ layer.kv_b_proj.weight.t()).view(tokens, HEADS, -1)
    k_nope, v = up.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
    key = apply_rope(kv[:, None, mla.kv_lora_rank :], cos, sin, True).expand(-1, HEADS, -1)
    q_rope = apply_rope(q[..., mla.qk_nope_head_dim :], cos, sin, True)
    q = torch.cat((q[..., : mla.qk_nope_head_dim], q_rope), dim=-1)
    scores = torch.einsum("thd,shd->hts", q, torch.cat((k_nope, key), dim=-1)) * layer.scale
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return layer.o_proj(torch.einsum("hts,shd->thd", probs, v).flatten(1))


@pytest.mark.parametrize("q_lora_rank", [None, 14])
def test_absorbed_attention_is_expanded_attention(q_lora_rank: int | None):
    sizes = MLAParams(12, 10, 6, 8, q_lora_rank)
    layer = ready(made(sizes))
    assert hasattr(layer, "q_proj") == (q_lora_rank is None)
    hidden = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(2))
    want = expanded(layer, hidden)
    torch.testing.assert_close(run(layer, hidden, 19), want, atol=1e-5, rtol=1e-5)
    packed = run(layer, torch.cat((hidden, hidden[:7])), 19, 7)
    torch.testing.assert_close(packed, torch.cat((want, want[:7])), atol=1e-5, rtol=1e-5)


def test_a_prompt_whose_keys_and_values_are_made_gives_the_same():
    """Where a kernel says that it pays: whole prompts, chunks, and beside single tokens."""
    layer = ready(made())
    requests = ((9, 9), (4, 17), (1, 21), (1, 6))
    generator = torch.Generator().manual_seed(1)
    metadata, _, blocks = paged_batch(requests, 2, 4, generator, CPU)
    hidden = torch.randn(15, HIDDEN, generator=generator)
    outs = []
    for contexts, pays in ((2, False), (2, True), (0, True)):
        cache = get_attention_backend("auto").allocate(layer.cache_spec(), blocks, 4, CPU)
        old = torch.randn(cache.k.shape, generator=torch.Generator().manual_seed(2))
        cache.k.copy_(old)
        layer._pays = lambda batch, pays=pays: pays and batch.num_contexts > 0
        batch = replace(metadata, caches={0: cache}, num_contexts=contexts)
        outs.append((layer(batch.positions, hidden, batch), cache.k))
    for out, cache in outs[1:]:
        torch.testing.assert_close(out, outs[0][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(cache, outs[0][1])


def test_a_norm_that_is_not_stock_is_called():
    class Wrapped(nn.Module):
        def __init__(self, norm: RMSNorm) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    layer = ready(made())
    want = run(layer, hidden, 5)
    layer.kv_a_layernorm = Wrapped(layer.kv_a_layernorm)
    torch.testing.assert_close(run(layer, hidden, 5), want)


def test_a_norm_with_an_offset_is_called():
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    layer = ready(made())
    want = run(layer, hidden, 5)
    layer.kv_a_layernorm.offset = 1.0
    layer.kv_a_layernorm.weight.data -= 1.0
    torch.testing.assert_close(run(layer, hidden, 5), want)


def test_generations_are_the_batch_without_its_contexts():
    requests = ((9, 9), (4, 17), (1, 21), (2, 6))
    metadata, _, _ = paged_batch(requests, 2, 4, torch.Generator().manual_seed(1), CPU)
    metadata = replace(metadata, state_slots=torch.arange(4))
    rest = metadata.generations
    assert (rest.query_lens, rest.kv_lens, rest.num_contexts) == ((1, 2), (21, 6), 0)
    assert (rest.max_query_len, rest.max_kv_len) == (2, 21)
    assert rest.cu_query_lens.tolist() == [0, 1, 3]
    assert rest.kv_lens_device.tolist() == [21, 6]
    assert torch.equal(rest.positions, metadata.positions[13:])
    assert torch.equal(rest.groups[0].block_tables, metadata.groups[0].block_tables[2:])
    assert torch.equal(rest.groups[0].slots, metadata.groups[0].slots[13:])
    assert rest.state_slots.tolist() == [2, 3]
    assert metadata.generations is rest


def test_the_cache_holds_a_latent_and_one_key():
    spec = made().cache_spec()
    assert (spec.kind, spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == ("latent", 1, 18, 12)
    assert spec.bytes_per_token == 18 * 4


def test_the_scale_has_yarns_temperature_squared():
    plain = made().scale
    assert plain == SIZES.qk_head_dim**-0.5
    yarn = replace(ROPE, rope_type="yarn", factor=4.0, mscale=0.5, mscale_all_dim=1.0)
    temperature = 0.1 * math.log(4.0) + 1.0
    assert made(rope=yarn).scale == pytest.approx(plain * temperature**2)
    assert made(rope=replace(yarn, mscale_all_dim=None)).scale == plain
    assert made(rope=yarn, scale=0.25).scale == 0.25


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="rope rotates 8 features, qk_rope_head_dim is 6"):
        made(rope=RopeParams(dim=8))
    with pytest.raises(ConfigError, match="needs layer_idx"):
        made(layer_idx=None)
    with pytest.raises(ConfigError, match="4 heads cannot be split over 3 ranks"):
        LatentProjection(HEADS, SIZES, Mapping(world_size=3, tp_size=3))


def test_a_rank_has_its_heads_of_the_latent_projection():
    rows = HEADS * (SIZES.qk_nope_head_dim + SIZES.v_head_dim)
    whole = torch.randn(rows, SIZES.kv_lora_rank, generator=torch.Generator().manual_seed(0))
    checkpoint = MemoryCheckpoint({"kv_b_proj.weight": whole})
    mapping = Mapping(world_size=2, rank=1, tp_size=2)
    tree = nn.Module()
    tree.kv_b_proj = LatentProjection(HEADS, SIZES, mapping)
    bind_tree(tree, config(mapping=mapping))
    load_weights(tree, plan_weights(tree, checkpoint, mapping=mapping), checkpoint)
    assert torch.equal(tree.kv_b_proj.weight, whole[rows // 2 :])


def test_kernels_that_read_v_from_its_own_tensor_refuse_a_latent_cache():
    """Sizes that they would serve otherwise."""
    shape = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "v_head_dim": 64}
    shape |= {"window": 0, "softcap": 0, "sinks": 0, "block_size": 16}
    info = DeviceInfo(torch.device("cuda"), frozenset({"cuda", "sm_90", "cupy"}))
    for latent, reason in ((0, None), (1, "latent cache")):
        told = supports(
            OpContext("paged_attention", torch.bfloat16, info, {**shape, "latent": latent})
        )
        assert told is None if reason is None else reason in str(told)


def test_the_reference_of_the_cache_write_is_not_captured_in_a_cuda_graph():
    runner = object.__new__(ModelRunner)
    runner._backend = SimpleNamespace(reference_only=False)
    runner.state_specs = {}
    cfg = config(ops=OpTable(DeviceInfo(CPU, frozenset())))
    runner.model = SimpleNamespace(model_config=cfg)
    assert runner._capturable()
    bind_tree(made(cfg=cfg), cfg)
    assert not runner._capturable()
