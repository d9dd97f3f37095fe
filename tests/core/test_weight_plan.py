"""Accounting: one error for all that does not fit; declared shards and ranks; rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from llmfw.errors import UsageError, WeightError
from llmfw.weights import MemoryCheckpoint, Shard, load_into, plan_weights
from weight_modules import FakeAttention, FakeDecoder, FakeLinear, decoder_tensors, module_of


@dataclass(frozen=True)
class Rank:
    tp_size: int
    tp_rank: int


EVERYTHING_WRONG = """\
6 problems between the model and memory checkpoint <memory> (11 tensors):
  missing    layers.0.q_proj.weight: no tensor fills it; it wants [8, 8] \
(part of layers.0.qkv_proj.weight) (nearest: layers.0.q_prj.weight)
  missing    norm.weight: no tensor fills it; it wants [8]
  surplus    layers.0.q_prj.weight: nothing takes this tensor [8, 8] \
(nearest: layers.0.q_proj.weight)
  shape      layers.1.o_proj.weight: the tensor is [8, 7], the model wants [8, 8]
  dtype      head.weight: the tensor is int8, the parameter float32
  duplicate  layers.1.qkv_proj.weight: there is this tensor and its parts layers.1.q_proj.weight, \
layers.1.k_proj.weight, layers.1.v_proj.weight
rename, split, fuse, tie or ignore them in the plugin's weight map (docs/plugins/weights.md)"""


def test_one_error_lists_all_that_does_not_fit() -> None:
    tensors = decoder_tensors()
    tensors["layers.0.q_prj.weight"] = tensors.pop("layers.0.q_proj.weight")
    del tensors["norm.weight"]
    tensors["layers.1.o_proj.weight"] = torch.zeros(8, 7)
    tensors["layers.1.qkv_proj.weight"] = torch.zeros(16, 8)
    tensors["head.weight"] = tensors["head.weight"].to(torch.int8)
    with pytest.raises(WeightError) as caught:
        plan_weights(FakeDecoder(), MemoryCheckpoint(tensors))
    assert str(caught.value) == EVERYTHING_WRONG
    assert {problem.kind for problem in caught.value.problems} == {
        "missing",
        "surplus",
        "shape",
        "dtype",
        "duplicate",
    }


def test_planning_changes_nothing() -> None:
    model = FakeDecoder()
    plan_weights(model, MemoryCheckpoint(decoder_tensors()))
    assert all(parameter.is_meta for parameter in model.parameters())


RENDERED = """\
parameter                 shape    tensor                  stored   file  note
embed.weight              [10, 8]  embed.weight            float32
norm.weight               [8]      norm.weight             float32
layers.0.qkv_proj.weight  [8, 8]   layers.0.q_proj.weight  float32        rows 0:8
layers.0.qkv_proj.weight  [4, 8]   layers.0.k_proj.weight  float32        rows 8:12
layers.0.qkv_proj.weight  [4, 8]   layers.0.v_proj.weight  float32        rows 12:16
layers.0.o_proj.weight    [8, 8]   layers.0.o_proj.weight  float32
head.weight                                                               tied to embed.weight
                          [10, 8]  head.weight             float32        ignored: tied
4 parameters, 1 tied, 1 tensors ignored; memory checkpoint <memory> (7 tensors)"""


def test_the_plan_as_a_table() -> None:
    model = FakeDecoder(layers=1, tied=True)
    plan = plan_weights(model, MemoryCheckpoint(decoder_tensors(1)))
    assert plan.render() == RENDERED


def test_a_tensor_fused_in_the_checkpoint_fills_declared_shards() -> None:
    tensors = decoder_tensors(1)
    parts = [tensors.pop(f"layers.0.{name}_proj.weight") for name in "qkv"]
    tensors["layers.0.qkv_proj.weight"] = torch.cat(parts)
    model = FakeDecoder(layers=1)
    load_into(model, tensors)
    assert torch.equal(model.layers[0].qkv_proj.weight, torch.cat(parts))


def test_a_fused_tensor_of_another_shape_is_told_once() -> None:
    tensors = decoder_tensors(1)
    for name in "qkv":
        del tensors[f"layers.0.{name}_proj.weight"]
    tensors["layers.0.qkv_proj.weight"] = torch.zeros(15, 8)
    with pytest.raises(WeightError, match=r"^1 problem between") as caught:
        load_into(FakeDecoder(layers=1), tensors)
    assert "the tensor is [15, 8], the model wants [16, 8]" in caught.value.message


def test_persistent_buffers_count_and_others_do_not() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.empty(2, device="meta"))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    with pytest.raises(WeightError, match="kept: no tensor fills it"):
        load_into(module, {})
    load_into(module, {"kept": torch.ones(2)})
    assert torch.equal(module.kept, torch.ones(2))
    assert "kept" in module.state_dict()


def test_a_module_at_the_root_has_shards_of_its_own_name() -> None:
    linear = FakeLinear(8, 12, (Shard("q", 8), Shard("k", 4)))
    q, k = torch.randn(8, 8), torch.randn(4, 8)
    load_into(linear, {"q.weight": q, "k.weight": k})
    assert torch.equal(linear.weight, torch.cat([q, k]))


def test_scalars_and_a_module_used_twice() -> None:
    module = module_of({"scale": torch.tensor(0.0)})
    module.first = FakeLinear(2, 2)
    module.again = module.first
    load_into(module, {"scale": torch.tensor(2.0), "first.weight": torch.ones(2, 2)})
    assert module.scale.item() == 2.0
    assert module.again.weight is module.first.weight


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_slice_of_every_shard(rank: int) -> None:
    tensors = {
        "q_proj.weight": torch.randn(8, 8),
        "k_proj.weight": torch.randn(4, 8),
        "v_proj.weight": torch.randn(4, 8),
        "o_proj.weight": torch.randn(8, 8),
    }
    for name in ("q", "k", "v", "o"):
        tensors[f"{name}_proj.bias"] = torch.randn(4 if name in "kv" else 8)
    attention = FakeAttention(tp_size=2, bias=True)
    load_into(attention, tensors, mapping=Rank(2, rank))
    for kind in ("weight", "bias"):
        parts = [tensors[f"{name}_proj.{kind}"].chunk(2)[rank] for name in "qkv"]
        assert torch.equal(getattr(attention.qkv_proj, kind), torch.cat(parts))
    assert torch.equal(attention.o_proj.weight, tensors["o_proj.weight"].chunk(2, dim=1)[rank])
    bias = tensors["o_proj.bias"] if rank == 0 else torch.zeros(8)
    assert torch.equal(attention.o_proj.bias, bias)


def test_a_rank_cuts_a_tensor_that_the_checkpoint_has_fused() -> None:
    q, k, v = torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8)
    tensors = {"qkv_proj.weight": torch.cat([q, k, v]), "o_proj.weight": torch.randn(8, 8)}
    attention = FakeAttention(tp_size=2)
    load_into(attention, tensors, mapping=Rank(2, 1))
    assert torch.equal(attention.qkv_proj.weight, torch.cat([q[4:], k[2:], v[2:]]))


def test_heads_fewer_than_ranks_are_shared_by_neighbours() -> None:
    shard = Shard("k_proj", 4, replicas=2)
    assert [shard.rows(4, rank) for rank in range(4)] == [(0, 2), (0, 2), (2, 4), (2, 4)]
    key = torch.randn(4, 8)
    for rank in range(4):
        linear = FakeLinear(8, 2, (shard,), "column")
        load_into(linear, {"k_proj.weight": key}, mapping=Rank(4, rank))
        assert torch.equal(linear.weight, key[rank // 2 * 2 : rank // 2 * 2 + 2])


def test_rows_that_do_not_divide_by_the_ranks() -> None:
    with pytest.raises(UsageError, match="do not divide by 3 tensor-parallel ranks"):
        Shard("q_proj", 8).rows(3, 0)
    with pytest.raises(WeightError, match=r"parallel +qkv_proj\.weight: q_proj: 8 rows"):
        load_into(FakeAttention(), {}, mapping=Rank(3, 0))


def test_a_large_model_that_fits_nowhere_is_told_quickly() -> None:
    tensors = {f"x.{name}": value for name, value in decoder_tensors(300).items()}
    begin = time.perf_counter()
    with pytest.raises(WeightError, match=r"^2406 problems"):
        plan_weights(FakeDecoder(layers=300), MemoryCheckpoint(tensors))
    assert time.perf_counter() - begin < 5
