"""One kernel for what two attention ops do: when it stands in for them, and that it is the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmfw import ModelConfig, RopeParams
from llmfw.attention.metadata import AttentionMetadata, LayerCache
from llmfw.kernels.cupy import rope_decode
from llmfw.layers import Attention, stock_layer
from llmfw.models import bind_tree, finish_loading
from llmfw.models.weights import materialize
from llmfw.ops import reference
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.table import OpTable

HERE = __name__
SINGLES, MIXED = (((1, 1), (1, 16), (1, 17), (1, 70)), 0), (((5, 5), (1, 17)), 1)
calls: list[str] = []


class Both:
    """rope_and_attend by its reference, for steps of single tokens."""

    def pays(self, metadata) -> bool:
        return not metadata.num_contexts and metadata.max_query_len == 1

    def __call__(self, *args: Any) -> torch.Tensor:
        calls.append("both")
        return reference.rope_and_attend(*args)


def both(context):
    return Both()


def rope(context):
    return reference.rope_and_cache


def attention(context):
    def call(*args: Any) -> torch.Tensor:
        calls.append("attention")
        return reference.paged_attention(*args)

    return call


PACK = tuple(
    Kernel(op, f"one.{op}", f"{HERE}:{name}", priority=50).from_pack("one")
    for op, name in (
        ("rope_and_cache", "rope"),
        ("paged_attention", "attention"),
        ("rope_and_attend", "both"),
    )
)
OTHER = Kernel("rope_and_cache", "other.rope", f"{HERE}:rope", priority=70).from_pack("other")
LESSER = replace(OTHER, priority=30)


BUILT = Kernel(
    "paged_attention",
    "third.attention",
    f"{HERE}:attention",
    priority=60,
    builds_on="one.paged_attention",
).from_pack("third")


def table(kernels: tuple[Kernel, ...] = PACK, select: str = "auto") -> OpTable:
    return OpTable(DeviceInfo(torch.device("cpu"), frozenset()), kernels, select)


def layer(ops: OpTable, **changes: Any) -> Attention:
    def stock(kind: str, role: str, config: ModelConfig, index: int | None, spec: Any) -> nn.Module:
        return stock_layer(kind, role, config, index, spec)

    config: ModelConfig = ModelConfig(
        pretrained_config=None, dtype=torch.float32, ops=ops, layer_factory=stock
    )
    settings = {"attn_backend": changes.pop("attn_backend", "auto")}
    config = replace(config, **settings)
    made = Attention(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_idx=0,
        config=config,
        **changes,
    )
    bind_tree(made, config)
    materialize(made, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    finish_loading(made)
    return made


def forward(made: Attention, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and caches of a batch."""
    generator = torch.Generator().manual_seed(1)
    metadata, _, blocks = paged_batch(*batch, 16, generator, torch.device("cpu"))
    k, v = torch.randn(2, blocks, 16, 2, 16, generator=generator)
    metadata = replace(metadata, caches={0: LayerCache(k, v)})
    hidden = torch.randn(sum(metadata.query_lens), 24, generator=generator)
    calls.clear()
    return made(metadata.positions, hidden, metadata), k, v


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": RopeParams(dim=16, max_positions=128), "qk_norm": True},
        {"rope": RopeParams(dim=8, max_positions=128, interleaved=True), "sliding_window": 9},
        {"softcap": 5.0, "sinks": True, "qk_norm": True, "norm_offset": 1.0},
        {"qk_norm": "full"},
    ],
)
def test_one_op_is_what_two_are(changes: dict[str, Any]) -> None:
    for batch, kind in ((SINGLES, "both"), (MIXED, "attention")):
        expected = forward(layer(table(()), **changes), batch)
        found = forward(layer(table(), **changes), batch)
        assert calls == [kind]
        for out, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kernels", "select", "changes", "kind"),
    [
        ((*PACK, OTHER), "auto", {}, ["attention"]),  # another pack's part goes first
        ((*PACK, LESSER), "auto", {}, ["both"]),
        ((*PACK, LESSER), "other", {}, ["attention"]),
        ((*PACK, OTHER), "one", {}, ["both"]),
        ((*PACK, BUILT), "auto", {}, ["both"]),  # it would leave such a step to the pack's own
        ((*PACK, replace(BUILT, builds_on="")), "auto", {}, ["attention"]),
        ((*PACK, BUILT), "-one.paged_attention", {}, []),
        ((*PACK, BUILT), "-one", {}, []),
        (PACK, "-one.rope_and_attend", {}, ["attention"]),
        (PACK, "rope_and_attend=reference", {}, ["attention"]),
        (PACK, "-one.rope_and_cache", {}, ["attention"]),
        (PACK, "paged_attention=reference", {}, []),
        (PACK, "reference", {}, []),
        (PACK, "auto", {"attn_backend": "vanilla"}, []),
    ],
)
def test_it_stands_in_for_its_own_packs_kernels_alone(
    kernels: tuple[Kernel, ...], select: str, changes: dict[str, Any], kind: list[str]
) -> None:
    forward(layer(table(kernels, select), **changes), SINGLES)
    assert calls == kind


def test_positions_of_a_layers_own_go_through_both_ops() -> None:
    """They may be as new as the kernel before, which the one kernel does not wait for."""

    class Shifted(Attention):
        shift: int | None = 1

        def attend(self, qkv, position_ids, attn_metadata):
            own = position_ids if self.shift is None else position_ids + self.shift
            return super().attend(qkv, own, attn_metadata)

    rotated = {"rope": RopeParams(dim=16, max_positions=128)}
    made = layer(table(), **rotated)
    made.__class__ = Shifted
    shifted, *_ = forward(made, SINGLES)
    assert calls == ["attention"]
    Shifted.shift = 0
    plain, *_ = forward(made, SINGLES)
    Shifted.shift = None
    both_at_once, *_ = forward(made, SINGLES)
    assert calls == ["both"]
    torch.testing.assert_close(both_at_once, plain, rtol=0, atol=0)
    assert not torch.equal(shifted, plain)


def test_what_it_would_bypass_is_told() -> None:
    ops = table((*PACK, OTHER))
    layer(ops)
    choice = next(c for c in ops.choices.values() if c.context.op == "rope_and_attend")
    assert choice.chosen == "reference"
    assert choice.refused == (
        ("one.rope_and_attend", "would bypass other.rope, which serves rope_and_cache"),
    )


def test_the_kernel_for_gpus_serves_single_tokens_whose_blocks_start_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128}
    shape |= {"rotary_dim": 128, "interleaved": 0, "qk_norm": 0, "block_size": 16}
    info = DeviceInfo(torch.device("cpu", 0), frozenset({"cuda", "cupy"}))
    context = OpContext("rope_and_attend", torch.bfloat16, info, shape)
    assert rope_decode.supports(context) is None
    wide = replace(context, shape=shape | {"head_dim": 256, "v_head_dim": 256})
    assert "256 are not one up to 128" in str(rope_decode.supports(wide))
    pays = rope_decode.RopeAndAttend(context).pays
    generator = torch.Generator().manual_seed(0)

    def batch(*requests: tuple[int, int], contexts: int = 0) -> AttentionMetadata:
        return paged_batch(requests, contexts, 16, generator, torch.device("cpu"))[0]

    assert pays(batch(*[(1, 9)] * 33))
    assert not pays(batch(*[(1, 9)] * 34))
    assert not pays(batch((1, 9), (2, 9)))
    assert not pays(batch((1, 9), contexts=1))
